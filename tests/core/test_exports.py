"""What users import, and that a package alone costs no torch."""

import subprocess
import sys

import pytest

LIGHT = ["astrai_core", "astrai_core.command_line", "astrai_serve", "astrai_serve.cli"]


def test_names_of_the_design_are_where_it_says():
    from astrai_core import Checkpoint
    from astrai_core.model import AutoModel, ModelConfig, Transformer
    from astrai_core.tokenizer import AutoTokenizer, ChatTemplate
    from astrai_serve import LLM, InferenceEngine
    from astrai_train.modules import SEQModule, SFTModule

    names = [AutoModel, AutoTokenizer, ChatTemplate, Checkpoint, InferenceEngine, LLM]
    names += [ModelConfig, SEQModule, SFTModule, Transformer]
    assert all(isinstance(name, type) for name in names)


def test_an_unknown_name_is_an_attribute_error():
    import astrai_core

    with pytest.raises(AttributeError, match="Nothing"):
        _ = astrai_core.Nothing


@pytest.mark.parametrize("module", LIGHT)
def test_a_light_module_does_not_import_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
