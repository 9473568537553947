"""The errors a user can cause. The command line prints their message alone and exits with code 2."""


class InputError(Exception):
    """Something the user gave is wrong: the message names it, what was given and what was expected."""


class ScheduleError(InputError):
    """A schedule breaks a rule (structure, matching, deadlock, hazard, lifetime); the message points at the op."""


class DeadlockError(ScheduleError):
    """No op can go on although some are left; the message names each blocked rank, its op and what it waits for."""
