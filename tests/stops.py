"""A user's Ctrl-C, in the middle of a run."""
from transformers import TrainerCallback


class Stop(TrainerCallback):
    "Ctrl-C after so many steps."

    def __init__(self, after):
        self.after = after

    def on_step_end(self, args, state, control, **kw):
        if state.global_step == self.after:
            raise KeyboardInterrupt
