"""The intermediate representation: programs, passes, effects and binding times."""

from fxparam.program.binding import BindingTime, binding_times
from fxparam.program.effects import Effect, effect_of
from fxparam.program.pipeline import Pass, run
from fxparam.program.program import Fragment, Program, Record, Site, copy_graph, deliver

__all__ = [
    "BindingTime",
    "Effect",
    "Fragment",
    "Pass",
    "Program",
    "Record",
    "Site",
    "binding_times",
    "copy_graph",
    "deliver",
    "effect_of",
    "run",
]
