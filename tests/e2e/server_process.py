"""`astrai-serve` as a process of its own, and a small random model for it."""

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import torch

from astrai_core.model import AutoModel, ModelConfig
from astrai_core.tokenizer import AutoTokenizer

COMMAND = Path(sys.executable).parent / "astrai-serve"
TEXTS = [
    "你好，世界！今天天气很好。",
    "hello world, the weather is fine today",
    "😀 北京 2 + 2 = 4",
]


def write_model(folder, texts=TEXTS, noise=0.0, **shape):
    """Write a random model, with noise added to its first weights, and a tokenizer; its folder."""
    torch.manual_seed(0)
    model = AutoModel.from_config(ModelConfig(vocab_size=320, n_heads=4, **shape)).eval()
    for parameter in model.parameters():
        parameter.data += noise * torch.randn_like(parameter)
    AutoModel.save_pretrained(model, folder)
    AutoTokenizer.train(texts * 20, 320).save_pretrained(folder)
    return folder


class ServerProcess:
    """`astrai-serve` as a user starts it, on a free port: its report, and its log from then on."""

    def __init__(self, model, *options):
        self.process = subprocess.Popen(
            [COMMAND, "--model", model, "--port", "0", *map(str, options)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        self.report = ""
        self.log: list[str] = []
        self._reading = threading.Thread(target=self._read_log)

    def __enter__(self):
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.report += line
            if line.startswith("  stop "):
                break
        found = re.search(r"https?://[\w.:]+", self.report)
        assert found, self.report
        self.url = found[0]
        # a pipe that nobody reads would hold the server up as soon as it is full of log
        self._reading.start()
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.wait()

    def send(self, signal):
        """Send a signal."""
        self.process.send_signal(signal)

    def wait(self, timeout=20.0):
        """Wait for the end, and return the exit status and what was printed meanwhile."""
        status = self.process.wait(timeout)
        self._reading.join()
        return status, "".join(self.log)

    def _read_log(self):
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            self.log.extend(lines)
