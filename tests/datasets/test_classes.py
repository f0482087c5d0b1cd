from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vilu.datasets.classes import ClassTable, class_table
from vilu.errors import DataError, UsageError

FOLDERS = ("n01", "red_fox", "ant")


def classes_file(folder: Path, text: str | bytes) -> Path:
    (folder / "classes.txt").write_bytes(text.encode() if isinstance(text, str) else text)
    return folder / "classes.txt"


def test_default_names_are_cleaned_and_raw_ones_kept():
    table = class_table(FOLDERS, None)
    assert table == ClassTable(FOLDERS, ("n01", "red fox", "ant"), has_cleaned_names=True)
    assert class_table(None, None) is None


@pytest.mark.parametrize(
    "text",
    [
        "zebra\nant\n",
        "\ufeffzebra\r\nant\r\n\r\n",
        "zebra\rant\r",
        "zebra\nant",
        " zebra \nant\n\n  \n",
    ],
)
def test_names_in_label_order(tmp_path, text):
    file = classes_file(tmp_path, text)
    assert class_table(None, file) == ClassTable(("zebra", "ant"), ("zebra", "ant"))
    table = class_table(["c0", "c1"], file, numeric_labels=True)
    assert table == ClassTable(("c0", "c1"), ("zebra", "ant"))


def test_tabbed_names_are_matched_with_the_folders(tmp_path):
    file = classes_file(tmp_path, "ant\tan ant\nn01\ta tench\nred_fox\ta red_fox\n")
    expected = ClassTable(FOLDERS, ("a tench", "a red_fox", "an ant"))
    assert class_table(FOLDERS, file) == class_table(FOLDERS, file, numeric_labels=True) == expected
    assert class_table(None, file).data_names == ("ant", "n01", "red_fox")


def test_numbers_before_names_are_the_labels_where_labels_are_numbers(tmp_path):
    file = classes_file(tmp_path, "2\tdog\n0\tcat\n1\tbird\n")
    assert class_table(None, file, numeric_labels=True) == ClassTable(
        ("0", "1", "2"), ("cat", "bird", "dog")
    )
    for text in ("1\tcat\n2\tdog\n", "0\tcat\n0\tdog\n", "0\tcat\n01\tdog\n"):
        with pytest.raises(DataError, match="must be the labels 0 to 1, each once"):
            class_table(None, classes_file(tmp_path, text), numeric_labels=True)


def test_plain_names_are_matched_with_the_folders(tmp_path):
    for text in ("ant\nn01\nred_fox\n", "red fox\nant\nn01\n"):
        assert class_table(FOLDERS, classes_file(tmp_path, text)) == class_table(FOLDERS, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n01\nred_fx\nant\n", "does not have: 'red_fx'. Did you mean 'red_fox' for 'red_fx'"),
        ("n01\ta\nred_fx\tb\nant\tc\n", "does not have: 'red_fx'. Did you mean 'red_fox'"),
        (
            "n01\nred_fox\nant\nbee\n",
            "does not have: 'bee'. Leave them out. .* make an empty sub-folder for each",
        ),
        ("n01\nant\n", "leaves out classes of the data: 'red_fox'"),
        ("n01\ta\n", "leaves out classes of the data: 'red_fox', 'ant'"),
        ("n01\nant\nred_fox\nred fox\n", "more than once: 'red_fox'"),
        ("n01\ta\nn01\tb\nant\tc\nred_fox\td\n", "more than once: 'n01'"),
        ("n01\t \nant\tx\nred_fox\ty\n", "line 1: blank name"),
        ("n01\n\nant\nred_fox\n", "line 2: blank name"),
        ("n01\tx\nant\n", "line 2: 1 columns"),
        ("n01\tx\ty\nant\tx\ty\n", "line 1: 3 columns, 'n01' and 'x' and 'y'"),
        ("", "line 1: blank name"),
        (b"caf\xe9\n", "must be UTF-8"),
    ],
)
def test_files_that_do_not_fit_the_folders(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        class_table(FOLDERS, classes_file(tmp_path, text))


def test_names_by_position_must_be_as_many_and_not_merely_reordered(tmp_path):
    with pytest.raises(DataError, match=r"one name per class of the data \(3\). Got 2"):
        class_table(FOLDERS, classes_file(tmp_path, "a\nb\n"), numeric_labels=True)
    with pytest.raises(DataError, match=r"another order \(class 0 is 'n01' in the data\)"):
        class_table(FOLDERS, classes_file(tmp_path, "ant\nn01\nred_fox\n"), numeric_labels=True)


def test_a_classes_file_that_cannot_be_read(tmp_path):
    for file in (tmp_path / "nowhere.txt", tmp_path):
        with pytest.raises(UsageError, match="cannot read the classes file"):
            class_table(FOLDERS, file)


@pytest.mark.parametrize(
    ("folders", "names", "message"),
    [
        ((), (), "Got 0 classes"),
        (("a", "b"), ("x",), "Got 2 classes, 1 names"),
        (("a", " "), ("x", "y"), "class names must not be blank. Class 1"),
        (("a", "b"), ("x", ""), "prompt names must not be blank. Class 1"),
        (("a", "b", "a", "b"), ("1", "2", "3", "4"), "Repeated: 'a', 'b'"),
        (("a\udce9",), ("x",), r"UTF-8 text"),
    ],
)
def test_tables_that_cannot_be(folders, names, message):
    with pytest.raises(DataError, match=message):
        ClassTable(folders, names)


def test_prompt_names_may_repeat_where_labels_or_raw_names_differ(tmp_path):
    """Prompt names may repeat, as in ImageNet's usual list.

    Equal candidates are one answer (``Embeddings``).
    """
    assert class_table(["a b", "a_b"], None).names == ("a b", "a b")
    assert class_table(FOLDERS, classes_file(tmp_path, "n01\tx\nant\tx\nred_fox\ty\n")).names == (
        "x",
        "y",
        "x",
    )
    assert class_table(None, classes_file(tmp_path, "x\ny\nx\n")).names == ("x", "y", "x")


def test_long_lists_are_cut_in_messages():
    with pytest.raises(DataError, match="'0', '1', '2', '3', '4' and 5 more"):
        ClassTable(tuple("0123456789" * 2), tuple(map(str, range(20))))


@given(st.binary(max_size=60))
def test_any_file_is_a_table_or_a_data_error(tmp_path_factory, content):
    file = classes_file(tmp_path_factory.mktemp("classes"), content)
    try:
        table = class_table(None, file)
    except DataError:
        return
    assert len(table.data_names) == len(table.names) > 0
