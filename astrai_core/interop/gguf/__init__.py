"""GGUF, llama.cpp's file: architecture and tensors as it computes them, tokens as it splits them.

Plain dicts, names and tensors; nothing here knows the model. What llama.cpp would compute otherwise
is refused by name.
"""

from astrai_core.interop.gguf.architecture import Architecture, choose_architecture
from astrai_core.interop.gguf.file import Kind, write_file
from astrai_core.interop.gguf.vocabulary import Vocabulary, read_vocabulary

__all__ = [
    "Architecture",
    "Kind",
    "Vocabulary",
    "choose_architecture",
    "read_vocabulary",
    "write_file",
]
