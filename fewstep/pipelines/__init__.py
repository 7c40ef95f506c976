"""The diffusers pipeline of an export: the code that the folder carries (``flow_map``, and what it imports from beside
it). ``fewstep.models.exported`` loads an export without running code from its folder."""
