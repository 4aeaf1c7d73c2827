"""The layouts that users have, their splits, and everything that can be wrong with them."""

import hashlib
import logging
import pickle
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from derm_parts import HAM_CODES, class_folders, dialogue, ham, llava, medmnist, write_csv, write_image
from lit_agentrl.envs.dermatology import HAM10000, ISIC, ClassFolders, LlavaImages, MedMNIST, Selection, file_image
from lit_agentrl.envs.dermatology.labels import CODES, DISEASES
from lit_agentrl.errors import UserError
from lit_agentrl.images import ImageRef

SPLITS = ("train", "val", "test")


def everything(source):
    return {split: source.samples(split) for split in SPLITS}


# HAM10000


def test_ham_is_read_from_both_folders_under_names(tmp_path):
    source = HAM10000(**ham(tmp_path))
    assert list(source.labels) == list(DISEASES)
    samples = [sample for split in SPLITS for sample in source.samples(split)]
    assert len(samples) == 7 * 12
    assert all(sample.label == CODES[sample.id.split("_")[1]] for sample in samples)
    assert {sample.image.parent.name for sample in samples} == {"HAM10000_images_part_1", "HAM10000_images_part_2"}
    assert all(sample.split == split for split in SPLITS for sample in source.samples(split))


def test_a_lesion_is_never_in_two_splits_and_every_label_in_each(tmp_path):
    for seed in range(5):
        source = HAM10000(**ham(tmp_path, 20, 3), select=Selection(val_share=0.2, test_share=0.2, seed=seed))
        lesions = {
            split: {(s.label, int(s.id[-3:]) // 3) for s in samples} for split, samples in everything(source).items()
        }
        assert not any(lesions[a] & lesions[b] for a, b in combinations(SPLITS, 2))
        for split, low, high in (("val", 4, 6), ("test", 4, 6), ("train", 8, 12)):
            counts = Counter(sample.label for sample in source.samples(split))
            assert set(counts) == set(DISEASES)
            assert all(low <= count <= high for count in counts.values())


def test_splits_depend_on_the_seed_and_hardly_on_new_images(tmp_path):
    files = ham(tmp_path, 20, 2)

    def test_ids(**select):
        return {sample.id for sample in HAM10000(**files, select=Selection(test_share=0.2, **select)).samples("test")}

    before = test_ids()
    assert test_ids() == before
    assert test_ids(seed=1) != before
    files = ham(tmp_path, 22, 2)  # one more lesion a label
    assert len(before & test_ids()) >= len(before) - 2 * 7


def test_first_tasks_are_balanced_over_labels(tmp_path):
    source = HAM10000(**ham(tmp_path, 20, 1), select=Selection(test_share=0.3))
    for split in SPLITS:
        samples = source.samples(split)
        assert all(len({sample.label for sample in samples[n : n + 7]}) == 7 for n in range(0, 14, 7))


def test_caps_count_per_label_and_split(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    whole = HAM10000(**ham(tmp_path, 20, 1))
    capped = HAM10000(**ham(tmp_path, 20, 1), select=Selection(max_per_class=5, max_held_out_per_class=1))
    assert [len(capped.samples(split)) for split in SPLITS] == [35, 7, 7]
    assert all({s.id for s in capped.samples(split)} <= {s.id for s in whole.samples(split)} for split in SPLITS)
    assert f"left out: {140 - 49} beyond the cap" in caplog.text


def test_csv_with_semicolons_and_a_byte_order_mark(tmp_path):
    source = HAM10000(**ham(tmp_path, delimiter=";", encoding="utf-8-sig"))
    assert len(source.samples("train")) > 0
    assert len(HAM10000(**ham(tmp_path, delimiter="\t")).samples("train")) == len(source.samples("train"))


def test_images_are_hashed_when_first_shown(tmp_path):
    files = ham(tmp_path)
    source = HAM10000(**files)
    sample = source.samples("train")[0]
    assert isinstance(sample.image, Path)
    shown = sample.shown()
    assert shown == ImageRef(str(sample.image), hashlib.sha256(sample.image.read_bytes()).hexdigest())
    sample.image.write_bytes(b"changed, and longer than before")
    assert sample.shown().sha256 != shown.sha256
    sample.image.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        sample.shown()


def test_a_listed_image_that_is_not_there_is_counted_and_named(tmp_path, caplog):
    files = ham(tmp_path)
    for id in ("ISIC_nv_000", "ISIC_nv_001", "ISIC_mel_003", "ISIC_df_000"):
        next(tmp_path.rglob(f"{id}.jpg")).unlink()
    source = HAM10000(**files)
    assert sum(len(source.samples(split)) for split in SPLITS) == 80
    assert "4 listed images are not there: ISIC_df_000, ISIC_mel_003, ISIC_nv_000 ..." in caplog.text


def test_a_lesion_that_the_layout_itself_has_in_two_splits_is_not_trained_on(tmp_path, caplog):
    files = ham(tmp_path)
    test = [
        {"lesion_id": f"HAM_{dx}_0", "image_id": f"test_{dx}", "dx": dx} for dx in HAM_CODES
    ]  # fmt: skip
    for row in test:
        write_image(tmp_path / "HAM10000_images_part_1" / f"{row['image_id']}.jpg")
    source = HAM10000(**files, test_metadata=write_csv(tmp_path / "test.csv", test))
    assert {sample.id for sample in source.samples("test")} == {row["image_id"] for row in test}
    left = {sample.id for split in ("train", "val") for sample in source.samples(split)}
    assert len(left) == 7 * 10
    assert not any(id.endswith(("000", "001")) for id in left)
    assert "14 images are left out because their lesion or patient is held out" in caplog.text


@pytest.mark.parametrize("column", ["dx", "image_id", "lesion_id"])
def test_a_missing_column_is_named_with_those_that_are_there(tmp_path, column):
    files = ham(tmp_path)
    path = Path(files["metadata"])
    path.write_text(path.read_text().replace(column, "other", 1))
    with pytest.raises(UserError, match=rf"no column for .*{column}.*it has .*other"):
        HAM10000(**files).samples("train")


def test_what_is_wrong_with_ham_is_said(tmp_path):
    files = ham(tmp_path)
    rows = Path(files["metadata"]).read_text().splitlines()

    def fails(match, lines=rows, images=files["images"], **select):
        path = tmp_path / "changed.csv"
        path.write_text("\n".join(lines))
        with pytest.raises(UserError, match=match):
            HAM10000(str(path), images, select=Selection(**select)).samples("train")

    fails("1 ids are given to more than one image: ISIC_akiec_000", [*rows, rows[1]])
    fails(r"not among actinic.*squamous cell carcinoma \(1\)", [*rows[:-1], rows[-1].replace("vasc,", "scc,")])
    fails(r"without a label \(1\)", [*rows[:-1], rows[-1].replace(",vasc,", ",,")])
    fails("no image of dermatofibroma", [row for row in rows if ",df," not in row])
    fails("no image of eczema", labels=[*DISEASES, "eczema"])
    fails(r"row 1: 3 fields, but the header names 6", [rows[0], "a,b,c"])
    fails("column 'image_id' is empty", [rows[0], "HAM_1,,nv,,,"])
    fails("no images are left", rows[:1])
    fails("needs a first line that names its columns", [])
    fails("needs a first line that names its columns", ["dx,dx", "nv,nv"])
    fails("No images in .*empty", images=[str(folder(tmp_path / "empty"))])
    fails("nowhere is not there", images=[str(tmp_path / "nowhere")])
    fails(r"84 are listed and not there \(ISIC_akiec_000.*", images=str(folder(tmp_path / "others", "unlisted.png")))
    fails("is not there", images=files["images"][0] + "x")
    with pytest.raises(UserError, match="metadata"):
        HAM10000(str(tmp_path / "no.csv"), files["images"]).samples("train")
    (tmp_path / "latin.csv").write_bytes("lesion_id,image_id,dx\nGrüße,a,nv".encode("latin-1"))
    with pytest.raises(UserError, match="not a csv file in UTF-8"):
        HAM10000(str(tmp_path / "latin.csv"), files["images"]).samples("train")


def folder(path: Path, *images: str) -> Path:
    path.mkdir(exist_ok=True)
    for name in images:
        write_image(path / name)
    return path


def test_other_labels_are_dropped_where_that_is_asked_for(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    two = ["melanoma", "melanocytic nevus"]
    source = HAM10000(**ham(tmp_path), select=Selection(labels=two, other_labels="drop"))
    assert list(source.labels) == two
    assert sum(len(source.samples(split)) for split in SPLITS) == 24
    assert "left out: 60 of other labels" in caplog.text


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"val_share": 1.0}, "val_share"),
        ({"val_share": 0.5, "test_share": 0.5}, "leave nothing"),
        ({"max_per_class": 0}, "max_per_class=0"),
        ({"max_held_out_per_class": -1}, "max_held_out"),
        ({"other_labels": "keep"}, "refuse and drop"),
        ({"labels": ["a"]}, "at least two"),
        ({"labels": ["a", "A "]}, "all different"),
    ],
)
def test_selections_that_make_no_sense_are_refused(options, match):
    with pytest.raises(UserError, match=match):
        Selection(**options)


# ISIC


def one_hot(root: Path, per_class: int = 6) -> dict[str, object]:
    codes = ("MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC")
    rows = [
        {"image": f"ISIC_{code}_{number}", **{other: f"{float(other == code)}" for other in codes}}
        for code in codes
        for number in range(per_class)
    ]
    for row in rows:
        write_image(root / "images" / f"{row['image']}.JPG")
    return {"metadata": write_csv(root / "truth.csv", rows), "images": str(root / "images")}


def test_isic_one_hot(tmp_path, caplog):
    source = ISIC(**one_hot(tmp_path))
    assert list(source.labels) == list(DISEASES)
    assert all(CODES[sample.id.split("_")[1].lower()] == sample.label for sample in source.samples("train"))
    assert "nothing says which images show one lesion" in caplog.text


def test_isic_groups_may_be_in_another_file(tmp_path):
    files = one_hot(tmp_path, 9)
    ids = [line.split(",")[0] for line in Path(files["metadata"]).read_text().splitlines()[1:]]
    groups = [{"image": id, "lesion_id": f"L{id[:-1]}{int(id[-1]) // 3}"} for id in ids]
    source = ISIC(**files, groups=write_csv(tmp_path / "groups.csv", groups), select=Selection(test_share=0.3))
    lesions = {split: {(s.label, int(s.id[-1]) // 3) for s in source.samples(split)} for split in SPLITS}
    assert not any(lesions[a] & lesions[b] for a, b in combinations(SPLITS, 2))
    assert all(len(lesions[split]) == 7 for split in SPLITS)


def test_isic_diagnosis_column_and_patients(tmp_path):
    """Patient p1 has lesions l1 and l2, and l2 is also listed without its patient: all of it stays together."""
    people = [("p1", "l1"), ("p1", "l2"), ("", "l2"), ("", "l1")]
    rows = [
        {"isic_id": f"A{n}.jpg", "diagnosis": ("Melanoma", "nevus")[n % 2], "patient_id": patient, "lesion_id": lesion}
        for n, (patient, lesion) in enumerate(people)
    ]
    rows += [
        {"isic_id": f"B{n}", "diagnosis": "nevus" if n % 2 else "melanoma", "patient_id": f"q{n}", "lesion_id": ""}
        for n in range(20)
    ]
    for row in rows:
        write_image(tmp_path / "deep" / "er" / f"{row['isic_id'].removesuffix('.jpg')}.png")
    names = {"nevus": "melanocytic nevus"}
    for seed in range(6):
        select = Selection(names=names, test_share=0.3, val_share=0.3, seed=seed)
        source = ISIC(write_csv(tmp_path / "m.csv", rows), str(tmp_path), select=select)
        assert list(source.labels) == ["melanoma", "melanocytic nevus"]
        homes = [split for split in SPLITS for sample in source.samples(split) if sample.id.startswith("A")]
        assert len(homes) == 4
        assert len(set(homes)) == 1


def test_isic_files_of_their_own_make_the_splits(tmp_path):
    files = one_hot(tmp_path)
    lines = Path(files["metadata"]).read_text().splitlines()
    for name, rows in (("train", lines[1::2]), ("test", lines[2::2])):
        (tmp_path / f"{name}.csv").write_text("\n".join([lines[0], *rows]))
    source = ISIC(str(tmp_path / "train.csv"), files["images"], test_metadata=str(tmp_path / "test.csv"))
    assert {s.id for s in source.samples("test")} == {line.split(",")[0] for line in lines[2::2]}
    assert len(source.samples("train")) + len(source.samples("val")) == len(lines[1::2])
    assert len(source.samples("val")) == 7  # one of each label


@pytest.mark.parametrize(
    ("values", "match"),
    [("1,1,0,0,0,0,0", "'MEL', 'NV'"), ("0,0,0,0,0,0,0", "none of"), ("x,0,0,0,0,0,0", "could not convert")],
)
def test_isic_rows_that_are_not_one_hot(tmp_path, values, match):
    files = one_hot(tmp_path)
    path = Path(files["metadata"])
    path.write_text(f"{path.read_text()}ISIC_new,{values}\n")
    with pytest.raises(UserError, match=match):
        ISIC(**files).samples("train")


def test_isic_without_a_diagnosis(tmp_path):
    path = write_csv(tmp_path / "m.csv", [{"image": "a", "age": 3}])
    write_image(tmp_path / "a.jpg")
    with pytest.raises(UserError, match=r"no column for the diagnosis, nor columns such as AKIEC.*it has image, age"):
        ISIC(path, str(tmp_path)).samples("train")
    with pytest.raises(UserError, match="looked for diagnosis_1"):
        ISIC(path, str(tmp_path), label_column="diagnosis_1").samples("train")
    with pytest.raises(UserError, match="looked for name"):
        ISIC(path, str(tmp_path), id_column="name").samples("train")


# Class folders


def test_class_folders_with_splits(tmp_path):
    layout = {"train/Melanoma": 6, "train/known_2": 6, "test/melanoma": 2, "test/known_2": 3, "train/.hidden": 1}
    source = ClassFolders(class_folders(tmp_path, layout), Selection(names={"known_2": "psoriasis"}, val_share=0.34))
    assert list(source.labels) == ["melanoma", "psoriasis"]
    assert [len(source.samples(split)) for split in SPLITS] == [8, 4, 5]
    assert all(sample.id.startswith("test/") for sample in source.samples("test"))
    assert all(sample.id.startswith("train/") for split in ("train", "val") for sample in source.samples(split))


def test_class_folders_without_splits(tmp_path):
    source = ClassFolders(class_folders(tmp_path, {"a b": 10, "c": 20}))
    assert [len(source.samples(split)) for split in SPLITS] == [24, 3, 3]
    assert Counter(sample.label for sample in source.samples("test")) == {"a b": 1, "c": 2}


def test_few_images_of_a_label_are_trained_on_first(tmp_path, caplog):
    source = ClassFolders(class_folders(tmp_path, {"rare": 1, "pair": 2, "many": 10}))
    counts = {split: Counter(sample.label for sample in source.samples(split)) for split in SPLITS}
    assert counts["train"] == {"rare": 1, "pair": 2, "many": 8}
    assert counts["val"] == counts["test"] == {"many": 1}
    assert "the test split has no image of pair, rare" in caplog.text


@pytest.mark.parametrize(
    ("layout", "match"),
    [
        ({"train/a": 2, "train/b": 0}, "no image of b"),
        ({"train/a": 0, "train/b": 0}, "No images in"),
        ({}, "No images in"),
        ({"train/a": 2, "b": 2}, r"folders of splits \(train\) and others \(b\)"),
        ({"train/a": 2}, "at least two labels"),
    ],
)
def test_class_folders_that_are_not_laid_out_so(tmp_path, layout, match):
    with pytest.raises(UserError, match=match):
        ClassFolders(class_folders(tmp_path, layout)).samples("train")


def test_an_empty_class_of_one_split_is_only_said(tmp_path, caplog):
    source = ClassFolders(class_folders(tmp_path, {"train/a": 2, "train/b": 2, "test/a": 1, "test/b": 0}))
    assert len(source.samples("test")) == 1
    assert "the test split has no image of b" in caplog.text


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="is not there"):
        ClassFolders(str(tmp_path / "no")).samples("train")


# MedMNIST


def test_medmnist(tmp_path):
    source = MedMNIST(medmnist(tmp_path / "derma.npz", {"train": 21, "val": 7, "test": 14}))
    assert list(source.labels) == list(DISEASES)
    assert [len(source.samples(split)) for split in SPLITS] == [21, 7, 14]
    with np.load(tmp_path / "derma.npz") as file:
        for split in SPLITS:
            for sample in source.samples(split):
                number = int(sample.id.removeprefix(f"{split}/"))
                assert np.array_equal(sample.shown(), file[f"{split}_images"][number])
                assert sample.label == DISEASES[int(file[f"{split}_labels"][number, 0])]


def test_medmnist_grey_capped_and_pickled(tmp_path):
    grey = np.arange(20 * 4 * 4, dtype=np.uint8).reshape(20, 4, 4)
    path = medmnist(tmp_path / "m.npz", {"train": 20, "val": 2, "test": 2}, num_labels=2, train_images=grey)
    source = MedMNIST(path, ["a", "b"], Selection(max_per_class=3))
    images = {sample.id: sample.shown() for sample in source.samples("train")}
    assert len(images) == 6
    assert all(image.shape == (4, 4, 3) and image.base is None for image in images.values())
    assert all(np.array_equal(images[id][..., 2], grey[int(id.removeprefix("train/"))]) for id in images)
    assert len(pickle.dumps(source)) < 2000
    twin = pickle.loads(pickle.dumps(source))
    assert [sample.id for sample in twin.samples("train")] == [sample.id for sample in source.samples("train")]


def test_what_is_wrong_with_an_npz_is_said(tmp_path):
    sizes = {"train": 4, "val": 2, "test": 2}

    def fails(match, names=("a", "b"), **changed):
        path = medmnist(tmp_path / "m.npz", sizes, num_labels=2, **changed)
        with pytest.raises(UserError, match=match):
            MedMNIST(path, names).samples("train")

    fails(r"train_labels holds \[1\], but class_names names the classes 0 to 0", names=["a"])
    fails("whole number", train_labels=np.zeros((4, 1)))
    fails("whole number", train_labels=np.zeros((4, 2), dtype=int))
    fails("uint8", train_images=np.zeros((4, 4, 4, 3)))
    fails("uint8", train_images=np.zeros((4, 4, 4, 4), dtype=np.uint8))
    fails("3 train_images, but 4 train_labels", train_images=np.zeros((3, 4, 4, 3), dtype=np.uint8))
    fails("not the .npz file", train_labels=np.array([print, 1, 1, 1], dtype=object))
    zeros = {f"{split}_labels": np.zeros(size, dtype=int) for split, size in sizes.items()}
    fails("no image of b", **zeros)

    def broken(match, content=None):
        path = tmp_path / "broken.npz"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError, match=match):
            MedMNIST(str(path)).samples("train")

    broken("is not there")
    broken("not the .npz file", b"")
    broken("not the .npz file", b"PK\x03\x04 cut")
    broken("not the .npz file", (tmp_path / "m.npz").read_bytes()[:-200])
    np.save(tmp_path / "one.npy", np.zeros(3))
    broken("single array", (tmp_path / "one.npy").read_bytes())
    np.savez(tmp_path / "other.npz", images=np.zeros(3))
    broken("no array 'train_labels'; it has images", (tmp_path / "other.npz").read_bytes())


# LLaVA


def test_llava_images_take_their_label_from_the_field_or_the_answers(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    records = [
        dialogue("1", "a.jpg", "<image>\nWhat is it?", "A melanoma.", "And now?", "See a doctor."),
        dialogue("2", "b.jpg", "What is it?\n<image>", "Look closely.", label="nv"),
        dialogue("3", "a.jpg", "Is it bad?", "Melanoma is."),
        dialogue("4", "c.jpg", "What is it?", "A melanoma or a nevus."),
        dialogue("5", None, "What is a nevus?", "A mole."),
        dialogue("6", "gone.jpg", "What is it?", "A nevus."),
    ]
    for name in "abc":
        write_image(tmp_path / "pictures" / f"{name}.jpg")
    for lines in (False, True):
        source = LlavaImages(llava(tmp_path / "l.json", records, lines=lines), str(tmp_path / "pictures"))
        found = {sample.id: sample for split in SPLITS for sample in source.samples(split)}
        assert {id: sample.label for id, sample in found.items()} == {
            "1": "melanoma",
            "2": "melanocytic nevus",
            "3": "melanoma",
        }
        assert (found["1"].question, found["1"].answer) == ("What is it?", "A melanoma.")
        assert found["2"].question == "What is it?"
        assert found["1"].split == found["3"].split  # one image
    assert "1 without an image" in caplog.text
    assert "1 of no known disease" in caplog.text
    assert "1 listed images are not there: gone.jpg" in caplog.text


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("", "holds no conversation"),
        ("[]", "holds no conversation"),
        ("[1", "not JSON"),
        ('{"id": 1}', "line 1: not a conversation"),
        ('{"conversations": []}', "must take turns"),
        ('[{"conversations": [{"from": "human", "value": "a"}]}]', "entry 1: the turns are from"),
        ('[{"conversations": [{"from": "gpt", "value": "a"}, {"from": "human", "value": "a"}]}]', "must take turns"),
        ('[{"conversations": [{"from": "human", "value": 1}, {"from": "gpt", "value": "a"}]}]', "a turn must be"),
        ('[{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": " "}]}]', "answer 1 is empty"),
        ('{"image": 3, "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}', "one path"),
    ],
)
def test_what_is_wrong_with_conversations_is_said(tmp_path, content, match):
    (tmp_path / "l.json").write_text(content)
    with pytest.raises(UserError, match=match):
        LlavaImages(str(tmp_path / "l.json")).samples("train")


def test_a_conversation_with_an_id_that_came_before(tmp_path):
    path = llava(tmp_path / "l.json", [dialogue("1", None, "q", "a")] * 2)
    with pytest.raises(UserError, match="entry 2: the id '1' came before"):
        LlavaImages(path).samples("train")


def test_a_big_set_is_listed_without_opening_images(tmp_path, monkeypatch):
    from lit_agentrl.envs.dermatology import samples

    monkeypatch.setattr(samples, "_reference", lambda *_: pytest.fail("an image was read"))
    assert HAM10000(**ham(tmp_path)).samples("train")
    with pytest.raises(BaseException, match="was read"):
        file_image(next(tmp_path.rglob("*.jpg")))
