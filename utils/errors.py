"""Errors that the user can put right; `utils.cli.run_command` prints them as one line."""


class UserError(Exception):
    """Base of them: the message names what is wrong and what to do."""

    exit_code = 1


class ConfigError(UserError, ValueError):
    """A setting is unknown, of the wrong type or out of range, or does not go with another one."""

    exit_code = 2


class DatasetError(UserError, ValueError):
    """The data on disk is not what the dataset needs."""


class RunError(UserError, RuntimeError):
    """A run folder is in use, finished or unfinished where it must not be."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint is missing, damaged, foreign, or does not fit."""


class ExportError(UserError, RuntimeError):
    """A package is missing, or the exported model does not do what PyTorch's does."""
