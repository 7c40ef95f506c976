"""The diffusers pipeline of an export: the code that its folder carries, which needs no fewstep."""
