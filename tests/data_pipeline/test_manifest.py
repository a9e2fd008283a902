"""Manifests: every fault is found before any work, all of them in one go."""

import csv
import json

import pytest

from data_pipeline.datasets import manifest
from unireg_jax.errors import NOTHING, USAGE, UserError

GOOD = [
    dict(
        id="a1",
        image="scans/a1.nii.gz",
        label="labels/a1.nii.gz",
        label_map="map.json",
        task="abdomen",
        subject="p1",
        split="train",
    ),
    dict(
        id="L.2-x",
        image="scans/l2.nii.gz",
        label="",
        label_map="",
        task="liver",
        subject="p2",
        split="val",
        group="art",
    ),
]


@pytest.fixture
def folder(tmp_path):
    for name in ("scans/a1.nii.gz", "scans/l2.nii.gz", "labels/a1.nii.gz"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    (tmp_path / "map.json").write_text('{"3": "liver", "10": "liver", "1": "aorta"}')
    return tmp_path


def _write_csv(folder, rows, columns=None):
    columns = columns or list(dict.fromkeys(c for row in rows for c in row))
    with open(folder / "m.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    return folder / "m.csv"


def _write_json(folder, value):
    (folder / "m.json").write_text(json.dumps(value))
    return folder / "m.json"


def _refusal(path, **options):
    with pytest.raises(UserError) as caught:
        manifest.collect(path, **options)
    return caught.value


def test_csv_and_json_give_the_same_records(folder):
    records = manifest.collect(_write_csv(folder, GOOD), strict=True).records
    assert records == manifest.collect(_write_json(folder, GOOD)).records
    assert records == manifest.collect(_write_json(folder, {"volumes": GOOD})).records
    first, second = records
    assert first.image == str(folder.resolve() / "scans" / "a1.nii.gz")
    assert first.label_map == ((1, "aorta"), (3, "liver"), (10, "liver"))
    assert (second.labels, second.label_map, second.group) == (None, None, "art")


def test_vocabulary_is_the_sorted_union_per_task(folder):
    (folder / "other.json").write_text('{"7": "spleen", "2": "LeftParotid"}')
    other = dict(GOOD[0], id="a2", subject="p3", label_map="other.json")
    records = manifest.collect(_write_csv(folder, [*GOOD, other])).records
    assert manifest.vocabulary(records) == {
        "abdomen": ("LeftParotid", "aorta", "liver", "spleen"),
        "liver": (),
    }


def test_byte_order_mark_blank_lines_and_spaces_are_read(folder):
    text = "id, image ,task,subject,split\n\n a ,scans/a1.nii.gz,lung,p,test\n,,,,\n"
    (folder / "m.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    (record,) = manifest.collect(folder / "m.csv").records
    assert (record.id, record.task, record.split) == ("a", "lung", "test")


@pytest.mark.parametrize(
    ("change", "reason", "says"),
    [
        (dict(task="abdomne"), "task_unknown", "did you mean 'abdomen'?"),
        (dict(task="99"), "task_unknown", "known: headneck, chest"),
        (dict(task=""), "schema", "task: is empty"),
        (dict(split="training"), "schema", "did you mean 'train'?"),
        (dict(subject=" "), "schema", "subject: is empty"),
        (dict(id=""), "id_invalid", "id: is empty"),
        (dict(id=".."), "id_invalid", "must not begin with a dot"),
        (dict(id="-rf"), "id_invalid", "must not begin with a dot or a dash"),
        (dict(id="a/b"), "id_invalid", "only letters, digits"),
        (dict(id="a\x00"), "id_invalid", "only letters, digits"),
        (dict(id="a" * 300), "id_invalid", "longer than 120 bytes"),
        (dict(id="/etc/passwd"), "id_invalid", "only letters, digits"),
        (dict(image=""), "schema", "image: is empty"),
        (dict(image="../a.nii.gz"), "path_escape", "--data-root"),
        (dict(image="/etc/hosts"), "path_escape", "--data-root"),
        (dict(image="~/a.nii.gz"), "path_escape", "a plain path expected"),
        (dict(image="$HOME/a.nii.gz"), "path_escape", "a plain path expected"),
        (dict(image="https://x/a.nii"), "path_escape", "a plain path expected"),
        (dict(image="file:a.nii"), "path_escape", "a plain path expected"),
        (dict(image="scans/.."), "path_escape", "--data-root"),
        (dict(image="scans/absent.nii.gz"), "not_found", "no such file"),
        (dict(label=""), "schema", "label_map without label"),
        (dict(label_map=""), "schema", "label without label_map"),
        (dict(label_map="absent.json"), "not_found", "no such file"),
    ],
)
def test_one_bad_field_is_named(folder, change, reason, says):
    rows = [{**GOOD[0], **change}, GOOD[1]]
    fault = _refusal(_write_json(folder, rows), strict=True)
    assert (fault.exit_code, fault.reason) == (USAGE, reason)
    assert says in str(fault)
    assert "m.json: 1 fault:\n  entry 1: " in str(fault)
    if "\x00" not in str(change):
        fault = _refusal(_write_csv(folder, rows), strict=True)
        assert (fault.reason, says in str(fault)) == (reason, True)
        assert "line 2: " in str(fault)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (99, "task_unknown"),
        (-1, "task_unknown"),
        (1.5, "task_unknown"),
        (True, "task_unknown"),
        (None, "schema"),
        ([1], "task_unknown"),
        ({}, "task_unknown"),
        (1e40, "task_unknown"),
    ],
)
def test_json_task_that_is_no_text_is_refused(folder, value, reason):
    fault = _refusal(_write_json(folder, [dict(GOOD[0], task=value)]))
    assert (fault.exit_code, fault.reason) == (USAGE, reason)


def test_link_out_of_the_folder_is_refused_unless_declared(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    (outside / "a.nii.gz").write_bytes(b"")
    (folder / "scans" / "link.nii.gz").symlink_to(outside / "a.nii.gz")
    (folder / "elsewhere").symlink_to(outside)
    for image, real in (
        ("scans/link.nii.gz", folder / "scans" / "link.nii.gz"),
        ("elsewhere/a.nii.gz", outside / "a.nii.gz"),
    ):
        path = _write_csv(folder, [dict(GOOD[0], image=image)])
        assert _refusal(path).reason == "path_escape"
        (record,) = manifest.collect(path, roots=[outside], strict=True).records
        assert record.image == str(real.parent.resolve() / real.name)


def test_absent_file_is_left_to_its_turn_unless_strict(folder):
    path = _write_csv(folder, [dict(GOOD[0], image="scans/later.nii.gz")])
    assert len(manifest.collect(path).records) == 1
    assert _refusal(path, strict=True).reason == "not_found"


def test_unknown_and_missing_columns_are_named_once(folder):
    rows = [
        {("lable" if k == "label" else k): v for k, v in row.items() if k != "split"}
        for row in GOOD
    ]
    fault = _refusal(_write_csv(folder, rows))
    assert str(fault).count("did you mean 'label'?") == 1
    assert str(fault).count("column 'split' is missing") == 1
    assert fault.exit_code == USAGE


def test_all_faults_are_listed_at_once(folder):
    rows = [
        dict(GOOD[0], task="knee", split="x"),
        dict(GOOD[1], id="a1", image="../x.nii"),
        dict(GOOD[1], id="A1", subject=""),
        dict(GOOD[0], id="b", split="test", typo="1"),
        dict(GOOD[0], id="c"),
    ]
    text = str(_refusal(_write_json(folder, rows)))
    for says in (
        "entry 1: task 'knee'",
        "entry 1: split 'x'",
        "entry 2: image '../x.nii'",
        "entry 3: subject: is empty",
        "entry 4: unknown column 'typo'",
        "entry 2: id 'a1' also at entry 1",
        "entry 3: id 'A1' only differs in form from 'a1' at entry 1",
    ):
        assert says in text
    assert "entry 5: subject 'p1' is in train, and in test at entry 4" in text
    assert text.startswith("m.json: 8 faults:\n")


def test_unicode_forms_of_one_id_collide(folder):
    rows = [dict(GOOD[0], id="é1"), dict(GOOD[0], id="e\u03011")]
    fault = _refusal(_write_json(folder, rows))
    assert "id_" in fault.reason and fault.exit_code == USAGE


def test_subject_in_two_splits_is_refused_unless_allowed(folder):
    rows = [GOOD[0], dict(GOOD[1], subject="p1")]
    path = _write_csv(folder, rows)
    fault = _refusal(path)
    assert fault.exit_code == USAGE and "--allow-leak" in str(fault)
    assert len(manifest.collect(path, allow_leak=True).records) == 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        (" \n", "is empty"),
        ("[1,]", "line 1, column 4"),
        ("{", "line 1, column 2"),
        ('[{"id": "a", "id": "b"}]', "key twice in one object: id"),
        ('[{"id": NaN}]', "NaN is not JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("9" * 100_000, "not valid JSON"),
        ('"text"', "a list of scans"),
        ('{"scans": []}', "a list of scans"),
        ("[1, null]", "entry 2: an object expected, got null"),
    ],
)
def test_json_that_is_no_manifest_is_refused(folder, text, says):
    (folder / "m.json").write_text(text)
    fault = _refusal(folder / "m.json")
    assert (fault.exit_code, fault.reason) == (USAGE, "schema")
    assert says in str(fault)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("id,image,id\n", "columns twice: id"),
        ("id,image,task,subject,split\na,b\n", "line 2: 5 fields expected, 2 found"),
        ('id,image\n"a,b\n', "line 2: "),
        ("id;image\na;b\n", "commas between columns expected, got semicolons"),
        ("id\timage\na\tb\n", "commas between columns expected, got tabs"),
    ],
)
def test_csv_that_is_no_manifest_is_refused(folder, text, says):
    (folder / "m.csv").write_text(text)
    fault = _refusal(folder / "m.csv")
    assert (fault.exit_code, fault.reason) == (USAGE, "schema")
    assert says in str(fault)


def test_files_that_cannot_be_manifests_are_refused(folder):
    (folder / "m.csv").write_bytes(b"id\xff")
    assert "UTF-8 text expected, byte 2" in str(_refusal(folder / "m.csv"))
    assert _refusal(folder / "none.csv").reason == "not_found"
    assert _refusal(folder).exit_code == USAGE
    (folder / "m.txt").write_text("id\n")
    assert ".csv or .json" in str(_refusal(folder / "m.txt"))


@pytest.mark.parametrize("name", ("m.csv", "m.json"))
def test_empty_list_is_nothing_to_do(folder, name):
    text = "id,image,task,subject,split\n" if name == "m.csv" else "[]"
    (folder / name).write_text(text)
    assert _refusal(folder / name).exit_code == NOTHING


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ("[]", "expected; list the ids"),
        ("{}", "expected; list the ids"),
        ('{"one": "a"}', "'one': a whole number"),
        ('{"-1": "a"}', "'-1': a whole number"),
        ('{"65536": "a"}', "'65536': a whole number"),
        ('{"1": ""}', "1: a name expected"),
        ('{"1": 2}', "1: a name expected, got a number"),
        ('{"0": "liver"}', "0: is background"),
        ('{"1": "a", "01": "b"}', "01: id listed twice"),
        ('{"1": "a", "1": "b"}', "key twice"),
        ('{"x": "a", "1": ""}', "'x': a whole number from 0 to 65535 expected; 1: "),
    ],
)
def test_bad_label_map_is_refused_once(folder, table, says):
    (folder / "map.json").write_text(table)
    other = dict(GOOD[0], id="a2", subject="p5")
    fault = _refusal(_write_csv(folder, [GOOD[0], other]))
    assert fault.exit_code == USAGE
    assert says in str(fault)
    assert "m.csv: 1 fault:\n" in str(fault)


def test_label_map_may_name_background(folder):
    (folder / "map.json").write_text('{"0": "Background", "2": "liver"}')
    assert manifest.read_label_map(folder / "map.json") == ((2, "liver"),)


def test_too_many_names_for_uint8_are_refused(folder):
    table = {str(i): f"n{i}" for i in range(1, 257)}
    (folder / "map.json").write_text(json.dumps(table))
    fault = _refusal(_write_csv(folder, GOOD[:1]))
    assert fault.reason == "label_set" and "at most 255" in str(fault)


def test_long_lists_of_faults_are_cut(folder):
    rows = [dict(GOOD[0], id=f"i{i}", task="x") for i in range(500)]
    text = str(_refusal(_write_csv(folder, rows)))
    assert "500 faults" in text and "… and 450 more" in text
    assert text.count("\n") == 51


def test_examine_gives_the_good_records_beside_the_faults(folder):
    rows = [GOOD[0], dict(GOOD[1], task="knee")]
    found, faults = manifest.examine(_write_csv(folder, rows))
    assert [record.id for record in found.records] == ["a1"]
    assert [reason for reason, _ in faults] == ["task_unknown"]
