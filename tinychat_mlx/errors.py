"""Every error a user can cause: what is wrong, where, what to do."""


class TinychatError(Exception):
    """Base of all errors that the command line prints as one line, without a traceback."""


class ModelNotFoundError(TinychatError):
    """A model name or path that leads nowhere."""


class DownloadError(TinychatError):
    """The hub is out of reach, refuses for now, or the disk does not take what it sends."""


class FormatError(TinychatError):
    """A file of a checkpoint is damaged, incomplete or not of the form it claims."""


class ConfigError(TinychatError):
    """config.json says something unknown, contradictory or unsupported."""


class TokenizerError(TinychatError):
    """A tokenizer or chat template is missing, damaged or refuses its input."""


class ContextFullError(TinychatError):
    """A prompt or a conversation has more tokens than the context holds."""


class BackendError(TinychatError):
    """A device, its library or its memory is not there or not enough."""


class UsageError(TinychatError):
    """An argument outside its meaning (a negative temperature, an empty prompt)."""
