from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from petals_chat.head import tuning
from petals_chat.head.modules import ClientModules, load_client_modules
from petals_chat.head.tuning import row_seconds, use_threads_that_pay, with_fastest_head
from petals_chat.models.checkpoint import open_checkpoint
from petals_chat.settings import HeadWeights
from tests.tiny_models import KINDS

MAPPED, COPIED = torch.bfloat16, torch.float32


@pytest.fixture
def modules(tmp_path: Path) -> ClientModules:
    """Of a 16-bit checkpoint, on a CPU that computes in float32."""
    KINDS["llama"].make_model(num_hidden_layers=1).to(torch.bfloat16).save_pretrained(tmp_path)
    return load_client_modules(
        open_checkpoint(str(tmp_path), None), device=torch.device("cpu"), dtype=torch.float32
    )


@pytest.fixture
def threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("weights", "copy_seconds", "dtype"),
    [
        (HeadWeights.MAPPED, 0.1, MAPPED),
        (HeadWeights.COPIED, 10.0, COPIED),
        (HeadWeights.AUTO, 0.5, COPIED),
        (HeadWeights.AUTO, 0.9, MAPPED),
    ],
)
def test_a_head_is_copied_where_that_is_wanted_or_pays(
    modules: ClientModules,
    weights: HeadWeights,
    copy_seconds: float,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tuning, "row_seconds", lambda of: copy_seconds if of.head.dtype is COPIED else 1.0)
    chosen = with_fastest_head(modules, weights)
    assert chosen.head.dtype is dtype
    assert torch.equal(chosen.head.float(), modules.head.float())


def test_a_head_in_the_precision_of_the_computation_is_left_alone(tmp_path: Path) -> None:
    KINDS["llama"].make_model(num_hidden_layers=1).save_pretrained(tmp_path)
    modules = load_client_modules(
        open_checkpoint(str(tmp_path), None), device=torch.device("cpu"), dtype=torch.float32
    )
    assert with_fastest_head(modules, HeadWeights.COPIED) is modules


@pytest.mark.parametrize(
    ("seconds", "left"), [({2: 1.0, 1: 0.9}, 1), ({2: 0.01, 1: 0.02}, 2), ({2: 1e-5, 1: 2e-5}, 1)]
)
@pytest.mark.usefixtures("threads")
def test_more_threads_stay_where_they_are_faster_and_the_head_is_not_tiny(
    modules: ClientModules, seconds: dict[int, float], left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "row_seconds", lambda _: seconds[torch.get_num_threads()])
    use_threads_that_pay(modules)
    assert torch.get_num_threads() == left


def test_a_row_is_measured_for_real(modules: ClientModules) -> None:
    assert 0 < row_seconds(modules) < 10
