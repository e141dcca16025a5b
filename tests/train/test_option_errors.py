import pytest

from astrai_train.option_errors import explain

DIMM = """\
Parser key "model":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'NoneType'>, <class 'lightning.pytorch.core.module.LightningModule'>]
  Errors:
    - Expected a <class 'NoneType'>
    - Problem with given class_path 'astrai_train.modules.SEQModule':
        Parser key "model":
          Does not validate against any of the Union subtypes
          Subtypes: [<class 'NoneType'>, <class 'astrai_core.model.config.ModelConfig'>]
          Errors:
            - Expected a <class 'NoneType'>
            - Problem with given class_path 'astrai_core.model.ModelConfig':
                Option 'dimm' is not accepted
          Given value type: <class 'jsonargparse._util.NestedArg'>
          Given value: NestedArg(key='dimm', val='1')
  Given value type: <class 'jsonargparse._util.NestedArg'>
  Given value: NestedArg(key='model.dimm', val='1')"""
PRECISION = """\
Parser key "trainer.precision":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'NoneType'>, typing.Literal[64, 32, 16], typing.Literal['64', 'bf16']]
  Errors:
    - Expected a <class 'NoneType'>
    - Expected a <class 'int'>
    - Expected a typing.Literal['64', 'bf16']
  Given value type: <class 'str'>
  Given value: fp3"""
MODULE = """\
Parser key "model":
  - Problem with given class_path 'astrai_train.modules.SEQModule':"""
HEADS = """\
Does not validate against any of the Union subtypes
Subtypes: [<class 'NoneType'>, <class 'lightning.pytorch.core.module.LightningModule'>]
Errors:
  - Expected a <class 'NoneType'>
  - dim 16 is not a multiple of n_heads 3; set head_dim or change one of them
Given value type: <class 'jsonargparse._namespace.Namespace'>
Given value: Namespace(class_path='astrai_train.modules.SEQModule')"""


@pytest.mark.parametrize(
    ("message", "line"),
    [
        (DIMM, "--model.model.dimm is not an option of ModelConfig; did you mean dim?"),
        (
            "Subcommand 'fit' does not accept option 'trainer.max_stepz'",
            "unknown option --trainer.max_stepz; did you mean --trainer.max_steps?",
        ),
        (
            "Unrecognized arguments: --checkpoint.every_minute 3",
            "unknown option --checkpoint.every_minute; did you mean --checkpoint.every_minutes?",
        ),
        (
            f"{MODULE}\n"
            "      Group 'optimizer' does not accept option 'weight_dekay'",
            "--model.optimizer has no option weight_dekay; did you mean weight_decay?",
        ),
        (
            f"{MODULE}\n"
            "      Option 'optimiser.lr' is not accepted",
            "--model.optimiser is not an option of SEQModule; did you mean optimizer?",
        ),
        ("Unrecognized arguments: --trainer.wings 3", "unknown option --trainer.wings"),
        (
            'Parser key "model":\n  - Expected a dot import path string: SEQModul',
            "--model: there is no class SEQModul for it; did you mean SEQModule?",
        ),
        (
            PRECISION,
            "--trainer.precision must be a whole number or one of 64, bf16, not fp3",
        ),
        (HEADS, "dim 16 is not a multiple of n_heads 3; set head_dim or change one of them"),
        (
            "Parser key \"trainer.max_steps\":\n  Expected a <class 'int'>. Got value: x",
            "--trainer.max_steps must be a whole number, not x",
        ),
        ("Unrecognized arguments: --trainer.max_step 3",
         "unknown option --trainer.max_step; did you mean --trainer.max_steps?"),
        ("Unrecognized arguments: stray", "stray is not an option; options start with --"),
        ("Option 'fit.model' is required but not provided or its value is None.",
         "--model is required"),
        ("argument --trainer.devices: expected one argument", "--trainer.devices needs a value"),
        ("the data file is damaged", "the data file is damaged"),
    ],
)  # fmt: skip
def test_the_cause_is_said_in_one_line(message, line):
    assert explain(message) == line
