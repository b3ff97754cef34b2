"""What a run on the emulated machine can raise."""


class MachineError(RuntimeError):
    """A program did what the machine does not define; `at` says where."""

    def at(self, place: str) -> "MachineError":
        """Return the same error with the instruction that raised it."""
        return type(self)(f"{self} at {place}")


class HazardError(MachineError):
    """An access that an asynchronous operation under way, or a missing fence, makes undefined."""


class AccessError(MachineError):
    """An address outside every buffer, or one that is not aligned."""


class UndefinedError(MachineError):
    """A register or byte was read that nothing has written."""


class DivergenceError(MachineError):
    """The lanes of a warp do not agree where they must."""


class DeadlockError(MachineError):
    """No warp can go on and no copy is under way."""
