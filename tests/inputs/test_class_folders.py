"""Class folders: labels, hidden and system files, and layouts that are refused."""

from pathlib import Path
from typing import Any

import pytest

from cluster.local.object_store import ObjectStore
from pipelines.config.train import TrainConfig
from pipelines.errors import RequestError
from pipelines.inputs.labelled import read_labelled, refuse_one_class
from pipelines.storage.filesystem import write_bytes
from pipelines.training.request import normalize, resolve_request

SYSTEM_FILES = [
    ".DS_Store",
    "cat/.DS_Store",
    "cat/._1.jpg",
    ".ipynb_checkpoints/1-checkpoint.jpg",
    "cat/.ipynb_checkpoints/1-checkpoint.jpg",
    "__MACOSX/cat/._1.jpg",
    "__MACOSX/cat/1.jpg",
    "@eaDir/cat/1.jpg",
    "cat/@eaDir/1.jpg/SYNOPHOTO_THUMB_XL.jpg",
    "#recycle/1.jpg",
    "$RECYCLE.BIN/1.jpg",
    "System Volume Information/IndexerVolumeGuid",
    ".Trash-1000/files/1.jpg",
    ".git/HEAD",
    "lost+found/1.jpg",
    "Thumbs.db",
    "cat/thumbs.DB",
    "cat/Desktop.ini",
    "_SUCCESS",
    "cat_$folder$",
]


def fill(root: str | Path, *names: str) -> str:
    for name in names:
        write_bytes(f"{root}/{name}", b"bytes")
    return str(root)


def labels(root: str | Path, *exclude: str) -> list[str]:
    found: list[str] = read_labelled(str(root), list(exclude)).table["label"].to_pylist()
    return found


@pytest.mark.parametrize("name", SYSTEM_FILES)
def test_hidden_and_system_files_are_ignored(name: str, tmp_path: Path, caplog: Any) -> None:
    root = fill(tmp_path / ".set", "cat/1.jpg", "dog/2.jpg", name)
    images = read_labelled(root, [])
    assert [row["uri"].removeprefix(f"{root}/") for row in images.table.to_pylist()] == ["cat/1.jpg", "dog/2.jpg"]
    assert images.num_excluded == 1
    assert "ignored hidden and system files: 1 (" in caplog.text


def test_hidden_and_system_files_in_a_bucket_are_ignored(store: ObjectStore, tmp_path: Path) -> None:
    root = fill(f"s3://scratch/{tmp_path.name}", "cat/1.jpg", "dog/2.jpg", *SYSTEM_FILES)
    images = read_labelled(root, [])
    assert (images.class_names(), images.num_excluded) == (["cat", "dog"], len(SYSTEM_FILES))


def test_names_that_resemble_system_names_are_classes(tmp_path: Path) -> None:
    names = ["a.b", "_background_noise_", "git", "thumbs", "@home", "tmp", "recycle"]
    assert labels(fill(tmp_path, *(f"{name}/1.jpg" for name in names))) == sorted(names)


@pytest.mark.parametrize(
    "names",
    [
        ("train/cat/1.jpg", "train/dog/1.jpg", "validation/cat/1.jpg"),
        ("train/1.jpg", "validation/1.jpg"),
        ("Train/cat/1.jpg", "VAL/cat/1.jpg"),
        ("train/cat/1.jpg", "test/cat/1.jpg", "extra/cat/1.jpg"),
        ("train/cat/1.jpg",),
    ],
)
def test_folder_of_dataset_splits_is_refused(names: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"contains dataset splits \(.*'[Tt]rain'.*\), not classes: use one of them"):
        labels(fill(tmp_path, *names))


def test_class_may_have_the_name_of_a_split(tmp_path: Path) -> None:
    assert labels(fill(tmp_path, "train/1.jpg", "bus/2.jpg", "test/3.jpg")) == ["bus", "test", "train"]


def test_class_folders_that_contain_only_folders_cause_a_warning(tmp_path: Path, caplog: Any) -> None:
    assert labels(fill(tmp_path / "a", "2023/cat/1.jpg", "2024/cat/1.jpg", "2024/dog/1.jpg")) == [
        "2023",
        "2024",
        "2024",
    ]
    assert "the top-level folders are used as classes: '2023', '2024'" in caplog.text
    caplog.clear()
    assert labels(fill(tmp_path / "b", "cat/1.jpg", "dog/deep/1.jpg")) == ["cat", "dog"]
    assert not caplog.text


def test_class_folder_without_images_is_refused(tmp_path: Path) -> None:
    root = fill(tmp_path, "cat/1.jpg", "cat/1.xml", "dog/no-suffix", "annotations/1.XML", "annotations/deep/list.txt")
    with pytest.raises(
        RequestError, match=r"annotations contains no images, only files that end in \.txt, \.xml: leave it"
    ):
        labels(root)
    assert labels(root, "annotations/*", "*.xml") == ["cat", "dog"]


def test_empty_class_folders_cause_a_warning(tmp_path: Path, caplog: Any) -> None:
    root = fill(tmp_path, "cat/1.jpg", "dog/2.jpg", "left-out/3.jpg")
    for name in ("bird/deep", ".hidden"):
        (tmp_path / name).mkdir(parents=True)
    assert labels(root, "left-out/*") == ["cat", "dog"]
    assert f"{root}: ignored folders without images, which do not become classes: 1 ('bird')" in caplog.text


def test_single_class_is_refused_with_a_hint_to_its_folders(tmp_path: Path) -> None:
    flat = read_labelled(fill(tmp_path / "cat" / "flat", "cat/1.jpg", "cat/2.jpg"), [])
    with pytest.raises(
        RequestError, match=r"all 2 images of data\.train\.uri belong to one class, 'cat'; a classifier needs"
    ):
        refuse_one_class(flat, "data.train.uri")
    deep = read_labelled(fill(tmp_path / "deep", "parent/cat/1.jpg", "parent/dog/2.jpg"), [])
    with pytest.raises(RequestError, match="one class, 'parent'; its folders 'cat', 'dog' look like classes"):
        refuse_one_class(deep, "data.train.uri")
    refuse_one_class(read_labelled(f"{tmp_path}/deep/parent", []), "data.train.uri")


def train(root: Path, data: str, validation: str | None = None) -> None:
    sections: dict[str, Any] = {"train": {"uri": f"{root}/{data}"}}
    if validation:
        sections["validation"] = {"uri": f"{root}/{validation}"}
    config = {
        "data": sections,
        "output": {"uri": f"{root}/out"},
        "model": {"name": "resnet18", "weights": "random"},
        "preprocess": {"image_size": 32},
        "optim": {"global_batch_size": 2},
    }
    resolve_request(normalize(TrainConfig.model_validate(config)))


def test_training_refuses_an_output_that_a_link_in_its_data_points_to(tmp_path: Path) -> None:
    fill(tmp_path, "set/cat/1.jpg", "set/dog/2.jpg", "out/cat/1.jpg")
    (tmp_path / "set" / "cat" / "runs").symlink_to(tmp_path / "out")
    with pytest.raises(RequestError, match=r"lies inside data\.train\.uri, by the link .*/set/cat/runs to .*/out:"):
        train(tmp_path, "set")


def test_training_refuses_a_single_class_before_it_reads_the_weights(tmp_path: Path) -> None:
    fill(tmp_path, "set/parent/cat/1.jpg", "set/parent/dog/2.jpg")
    with pytest.raises(RequestError, match="belong to one class"):
        train(tmp_path, "set")


def test_overlap_of_training_and_validation_images_causes_a_warning(tmp_path: Path, caplog: Any) -> None:
    fill(tmp_path, "set/cat/1.jpg", "set/dog/2.jpg", "other/cat/1.jpg")
    train(tmp_path, "set", "set")
    assert "2 of the validation images are training images too" in caplog.text
    caplog.clear()
    train(tmp_path, "set", "other")
    assert "training images too" not in caplog.text
