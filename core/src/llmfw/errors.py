"""Everything llmfw raises on purpose.

    LlmfwError
    |-- UsageError (also ValueError)     2   a flag, keyword or setting that cannot be
    |-- ConfigError (also ValueError)    3   a model not found, or a config that cannot be read
    |-- CheckpointError                  4   a file of weights missing, truncated or unsafe
    |-- WeightError                      5   checkpoint and model do not fit each other
    |-- PluginError
    |   |-- UnknownArchitectureError     6   no installed plugin serves it
    |   |-- PluginConflictError          7   two plugins serve it
    |   |-- PluginLoadError              8   the plugin's code fails to import
    |   |-- PluginIncompatibleError      9   its metadata rule out the installed versions
    |   |-- PluginContractError         10   its hooks are not those of the contract
    |   `-- ForeignDistributionError    11   somebody else's package is installed under our name
    |-- KernelError                     12   a kernel cannot be compiled, chosen or trusted
    |-- DeviceError                     13   no such device, or not enough memory on it
    |-- RequestError (also ValueError)  14   one request that cannot be served; the engine lives
    |-- TokenizerError                  15   the tokenizer is missing or cannot be read
    `-- EngineError                     16   the engine itself stopped

The number is the process's exit code when the command line ends with that error. 0 is success, 1
means only "a check found a difference", 130 is Ctrl-C.
"""

from __future__ import annotations


class LlmfwError(Exception):
    """Base of all errors of llmfw: what happened, and in `hint` what to do about it.

    Args:
        message: What is wrong and where, naming the plugin, tensor, file or flag.
        hint: What to do, one cure a line.
        **fields: Facts for programs, kept as attributes (`error.tensor`, `error.dist`, ...).
    """

    exit_code = 16

    def __init__(self, message: str, *, hint: str | None = None, **fields: object) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.__dict__.update(fields)

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class UsageError(LlmfwError, ValueError):
    """A flag, keyword argument or environment variable that is unknown or out of range."""

    exit_code = 2


class ConfigError(LlmfwError, ValueError):
    """A model that cannot be found, or whose configuration cannot be read or served."""

    exit_code = 3


class CheckpointError(LlmfwError):
    """A weight file that is missing, truncated, corrupt or unsafe to read."""

    exit_code = 4


class WeightError(LlmfwError):
    """Tensors and parameters that do not fit: missing, surplus, mismatched or duplicate."""

    exit_code = 5


class PluginError(LlmfwError):
    """Base of what can be wrong with a plugin."""

    exit_code = 8


class UnknownArchitectureError(PluginError):
    """No installed plugin serves the architecture."""

    exit_code = 6


class PluginConflictError(PluginError):
    """More than one installed plugin serves the architecture and none was chosen."""

    exit_code = 7


class PluginLoadError(PluginError):
    """The plugin's code raised while it was imported."""

    exit_code = 8


class PluginIncompatibleError(PluginError):
    """The plugin's requirements rule out what is installed."""

    exit_code = 9


class PluginContractError(PluginError):
    """A hook that the contract does not know, or one with a wrong signature or result."""

    exit_code = 10


class ForeignDistributionError(PluginError):
    """The unrelated distribution `llmfw` is installed and hides ours."""

    exit_code = 11


class KernelError(LlmfwError):
    """A kernel that cannot be compiled, was asked for and cannot serve, or gives wrong numbers."""

    exit_code = 12


class DeviceError(LlmfwError):
    """No such device, or not enough memory on it."""

    exit_code = 13


class RequestError(LlmfwError, ValueError):
    """One request that cannot be served; other requests go on."""

    exit_code = 14


class TokenizerError(LlmfwError):
    """The tokenizer or chat template is missing or cannot be read."""

    exit_code = 15


class EngineError(LlmfwError):
    """The engine stopped: an internal failure, with the cause chained."""

    exit_code = 16


def reading_cure(error: OSError, otherwise: str) -> str:
    """The hint where a file or folder cannot be read.

    Args:
        error: What the system said.
        otherwise: The hint where it is not a matter of permissions.
    """
    if isinstance(error, PermissionError):
        return "ask its owner for permission to read it, or take a copy of your own"
    return otherwise
