"""`import pte` is all that PEFT's functions need, in either order, and costs nearly nothing."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from peft_models import logits_of, peft_model, token_ids
from pte.tasks.chained import embedded_model_dir
from tiny import tiny_base

pytestmark = pytest.mark.system

LOAD = """
import sys
{imports}
import torch
from transformers import AutoModelForCausalLM
model = peft.AutoPeftModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float64)
print(model.base_model.__class__.__name__, model(torch.tensor({tokens})).logits.sum().item())
"""
ORDERS = {
    "pte first": "import importlib.util, pte\nimportlib.util.find_spec('peft')\nfrom peft import tuners\nimport peft",
    "peft first": "import peft, pte",
    "our room first": "from pte.integrations.peft import policy_of\nimport peft",
}


def run(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", code, *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("order", ORDERS)
def test_peft_loads_a_thought_adapter_whichever_is_imported_first(order: str, tmp_path: Path) -> None:
    tiny_base().save_pretrained(tmp_path / "base")
    base = type(tiny_base()).from_pretrained(tmp_path / "base")
    model = peft_model(base=base)
    model.save_pretrained(tmp_path / "adapter")
    expected = logits_of(model, token_ids()).sum().item()
    tokens = token_ids().tolist()
    name, total = run(LOAD.format(imports=ORDERS[order], tokens=tokens), str(tmp_path / "adapter")).split()
    # PEFT loads the adapter in float32.
    assert name == "PTEModel" and float(total) == pytest.approx(expected, abs=1e-3)


def test_importing_pte_imports_no_peft_and_takes_a_moment() -> None:
    code = """
import time
import torch
start = time.perf_counter()
import pte
seconds = time.perf_counter() - start
import sys
print(seconds, "peft" in sys.modules, "transformers" in sys.modules)
"""
    seconds, *loaded = run(code).split()
    assert loaded == ["False", "False"] and float(seconds) < 0.3


def test_peft_of_another_version_still_imports_and_the_warning_says_why_ours_does_not() -> None:
    code = """
import importlib.metadata, warnings
real = importlib.metadata.version
importlib.metadata.version = lambda name: "0.22.0" if name == "peft" else real(name)
import pte
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import peft
print([str(one.message) for one in caught if one.category is RuntimeWarning])
print("PTE" in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING)
"""
    messages, known = run(code).splitlines()
    expected = (
        "adapters of peft_type PTE need peft 0.21.*, got 0.22.0; in the checkout of pte run pip install -e '.[peft]'"
    )
    assert messages == str([expected])
    assert known == "False"


def test_the_example_of_the_documentation_runs(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text()
    section = text.partition("\n## PEFT\n")[2].partition("\n## ")[0]
    (example,) = re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    assert "src/pte/tasks/embedded" in example
    code = example.replace("src/pte/tasks/embedded", str(embedded_model_dir()))
    total = run(
        f"import os\nos.chdir({str(tmp_path)!r})\n{code}\nprint(len(rollouts), logprobs.isfinite().all().item())"
    )
    assert total.split() == ["4", "True"]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
