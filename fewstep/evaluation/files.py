"""Where ``replace_file`` used to be."""

from fewstep.disk import replace_file as replace_file
