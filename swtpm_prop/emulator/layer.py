"""The layer inside swtpm: one guest's banks, index and property log around the pure translation.

Imported by the preloaded object in every opted-in guest's swtpm, so it imports little.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from swtpm_prop.emulator import config
from swtpm_prop.emulator.log import Log
from swtpm_prop.errors import Error
from swtpm_prop.translate import layer as translation
from swtpm_prop.translate import record
from swtpm_prop.translate.policy import Bank
from swtpm_prop.translate.verdict import Verdict
from swtpm_prop.trust.index import Index

Execute = Callable[[bytes], bytes]
"""One command for the real TPM, its response; RuntimeError where libtpms gives none."""


class Layer:
    """What the preloaded object calls.

    Attributes:
        codes: the TPM command codes that it must bring to ``process``.
        breaks: the commands that it must execute once ``process`` or ``resumed`` has raised.
    """

    def __init__(self, banks: tuple[Bank, ...], index: Index, log: Log, execute: Execute) -> None:
        self.codes = translation.codes(banks)
        self.breaks = translation.breaks(banks)
        self._banks = banks
        self._index = index
        self._log = log
        self._execute = execute

    def process(self, command: bytes) -> bytes:
        """One command of the guest (at least 10 bytes) to its response.

        Raises:
            Exception: the layer cannot keep its promise; it must not be called again.
        """
        return self._run(translation.handle(command, self._banks, self._judge))

    def resumed(self) -> None:
        """To be called each time the TPM was started, before its first command. Raises as ``process``."""
        self._run(translation.resumed(self._banks))

    def _run(self, steps: translation.Steps) -> bytes:
        try:
            command = next(steps)
            while True:
                command = steps.send(self._execute(command))
        except StopIteration as done:
            outcome: translation.Outcome = done.value
        except Exception as error:
            id, what = (error.id, error.what) if isinstance(error, Error) else ("layer.python", repr(error))
            self._log.write((record.failure(id, what),))
            raise
        self._log.write(outcome.records)
        return outcome.response

    def _judge(self, bank: Bank, measured: Mapping[str, bytes]) -> Verdict:
        self._index.refresh()
        return self._index.judge(bank.properties, measured, int(time.time()))


def start(path: str, execute: Execute) -> Layer:
    """The layer of the guest whose layer.json is at ``path``.

    Raises:
        LayerError: ``layer.config-*``, ``layer.log-unwritable``.
        StoreError: ``store.index-*``.
    """
    settings = config.load(path)
    index = Index.open(settings.index_path)
    return Layer(settings.banks, index, Log(settings.log_path), execute)
