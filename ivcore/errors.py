"""Errors that carry one sentence for the user: what was wrong, where, and what to do."""


class IvError(Exception):
    """Base of every error this project raises on purpose; `str(error)` is the user's message."""


class ConfigError(IvError):
    """A config.json that cannot be read or asks for something this package does not implement."""


class CheckpointError(IvError):
    """Weights that are missing, damaged, or do not fit their config."""


class MediaError(IvError):
    """A video or an image that cannot be opened, decoded or resized."""


class PromptError(IvError):
    """Messages, a chat template or a tokenizer from which no valid prompt can be made."""


class BackendError(IvError):
    """A backend that is not installed, or a request that it cannot carry out."""


class TrainingError(IvError):
    """Training data, settings or an adapter that cannot be trained with, or a step that went wrong."""


class OtherProcessError(IvError):
    """Another process of this run has failed. It has no message: process 0 gives the reason, once for all of them."""
