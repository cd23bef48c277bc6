"""Columns computed by the model: the registered ones, and what all of them have in common."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch

from cluster.local.ray_head import RayHead
from pipelines.config.verify import VerifyConfig
from pipelines.errors import RequestError
from pipelines.inference import verify
from pipelines.outputs import open_output
from pipelines.outputs.columns import Embedding, Tolerance, TopK, floating_fields, register, registered, values_of
from tests.support.entropy_column import Entropy
from tests.support.infer import infer
from tests.support.schemas import schema_of_parts

NUM_IMAGES = 66
MODEL = {"name": "test_resnet", "weights": "random"}


@pytest.fixture
def entropy() -> Iterator[Entropy]:
    column = Entropy()
    register(column)
    yield column
    registered.clear()


def label(ray_server: RayHead, photographs: Path, output: Path) -> None:
    sections = {"input": {"uri": str(photographs)}, "output": {"uri": str(output)}, "outputs": {"topk": 1000}}
    infer(ray_server, model=MODEL, preprocess={"image_size": 64}, failure={"max_fraction": 0.1}, **sections)


def check(output: Path) -> dict[str, object]:
    return verify.run(VerifyConfig.model_validate({"output": {"uri": str(output)}, "sample": {"num_rows": 8}}))


def test_registered_column_is_written_verified_and_part_of_the_identity(
    entropy: Entropy, ray_server: RayHead, photographs: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    label(ray_server, photographs, output)
    rows = open_output(str(output)).table(columns=["prob", "entropy"])
    prob = np.stack(rows["prob"].to_pylist())
    expected = -(prob * np.log(prob)).sum(axis=1)
    np.testing.assert_allclose(rows["entropy"].to_numpy(), expected, atol=1e-4)
    assert check(output)["num_sampled"] == 8

    registered.clear()
    with pytest.raises(RequestError, match=r"outputs\.registered_columns was \['entropy'\], is \[\]"):
        label(ray_server, photographs, output)
    with pytest.raises(RequestError, match=r"registered columns \['entropy'\], but this process registered \[\]"):
        check(output)


@pytest.mark.parametrize("name", ["topk", "embedding", "entropy"])
def test_name_of_columns_is_unique(entropy: Entropy, name: str) -> None:
    entropy.name = name
    with pytest.raises(ValueError, match=f"there are columns named '{name}' already"):
        register(entropy)


def test_topk_equals_torch() -> None:
    model = SimpleNamespace(num_features=3, label_names=tuple("abcd"))
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    computed = TopK(2).compute(logits.to(torch.bfloat16), logits)
    index, prob, names = TopK(2).arrays([tensor.numpy() for tensor in computed], model)
    expected = logits.to(torch.bfloat16).float().softmax(-1).topk(2)
    assert prob.to_pylist() == expected.values.tolist()
    assert index.to_pylist() == expected.indices.tolist()
    assert names.to_pylist() == [["abcd"[position] for position in row] for row in expected.indices]
    assert [array.type for array in (index, prob, names)] == [field.type for field in TopK(2).fields(model)]


def test_embedding_is_the_features_in_float32() -> None:
    model = SimpleNamespace(num_features=3, label_names=())
    features = torch.randn(2, 3, dtype=torch.bfloat16)
    (values,) = Embedding().compute(features, features)
    (column,) = Embedding().arrays([values.numpy()], model)
    assert column.to_pylist() == features.float().tolist()
    assert column.type == Embedding().fields(model)[0].type


@pytest.mark.parametrize(
    ("old", "new", "differs"),
    [
        ([0.9, 0.1], [0.85, 0.15], False),
        ([0.9, 0.1], [0.75, 0.25], True),
        ([0.52, 0.48], [0.51, 0.49], False),
    ],
)
def test_topk_differs_if_a_probability_differs_by_more_than_the_tolerance(
    old: list[float], new: list[float], differs: bool
) -> None:
    before, after = {"index": [7, 3], "prob": old}, {"index": [7, 3], "prob": new}
    found = TopK(2).difference(before, after, Tolerance(prob=0.1, embedding=0))
    assert found == ("the probability of class 7 was 0.90000 and is now 0.75000" if differs else None)


def test_topk_differs_if_a_clear_winner_changes() -> None:
    old, new = {"index": [7, 3], "prob": [0.9, 0.1]}, {"index": [3, 7], "prob": [0.9, 0.1]}
    assert TopK(2).difference(old, new, Tolerance(0.1, 0)) is not None
    close = {"prob": [0.52, 0.48]}
    assert TopK(2).difference(old | close, new | close, Tolerance(0.1, 0)) is None


def test_embedding_differs_by_a_fraction_of_its_norm() -> None:
    old, new = {"embedding": [3.0, 4.4]}, {"embedding": [3.0, 4.0]}
    assert Embedding().difference(old, new, Tolerance(0, 0.09)) is None
    assert Embedding().difference(old, new, Tolerance(0, 0.07)) == "the embedding differs by 0.08 of its norm"


def test_floating_fields_include_lists() -> None:
    schema = pa.schema([*schema_of_parts(2, 4), pa.field("entropy", pa.float32()), pa.field("key", pa.string())])
    assert [field.name for field in floating_fields(schema)] == ["prob", "embedding", "entropy"]
    assert values_of(pa.array([[1.0, 2.0], [3.0]])).tolist() == [1, 2, 3]
    assert values_of(pa.array([1.5, 2.5])).tolist() == [1.5, 2.5]
