import pytest
import yaml

from verl.extension.user_files import read_yaml
from verl.extension.yaml_file import YamlFileError, read_node

# Each line stands for ten times the values of the line before.
LAUGHS = "a: &a [1]\n" + "".join(f"{new}: &{new} [{f'*{old},' * 10}]\n" for old, new in ("ab", "bc", "cd", "de", "ef"))


@pytest.fixture
def written(tmp_path):
    def write(content):
        path = tmp_path / "mine.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("a:\n\tb: 1\n", "line 2: .*a tab"),
        ("a: [1,\n", "line 2: is not YAML .*expected"),
        ("a: 1\n b: 2\n", "line 2: is not YAML"),
        ("a: *nowhere\n", "line 1: .*undefined alias"),
        ("a: 1\n---\na: 2\n", "line 2: a second document"),
        ("a: 1\nb: !!python/object:os.system x\n", "line 2: the tag !!python/object:os.system"),
        ("a: !mine x\n", "line 1: the tag !mine"),
        ("a: !!binary aGVsbG8=\n", "line 1: the tag !!binary"),
        ("a: !!set {b}\n", "line 1: the tag !!set"),
        ("a: 1\nb:\n  c: 1\na: 2\n", "line 4: the key 'a' stands in line 1 too"),
        ("a:\n  b: 1\n  b: 1\n", "line 3: the key 'b' stands in line 2 too"),
        ("[a, b]: 1\n", "line 1: a list is a key"),
        ("{a: b}: 1\n", "line 1: a mapping is a key"),
        ("a: &x\n  b: *x\n", "line 2: contains itself|line 1: contains itself"),
        ("a: &x [*x]\n", "line 1: contains itself"),
        (LAUGHS, "stands for more than"),
        ("a: " + "[" * 700 + "]" * 700, "nested too deeply"),
        ("a: " + "9" * 5000, "line 1: '9+ cannot be read as int"),
        ("a: !!int x\n", "line 1: 'x' cannot be read as int"),
        ("a: !!bool x\n", "line 1: 'x' cannot be read as bool"),
        ("a: !!timestamp x\n", "line 1: 'x' cannot be read as timestamp"),
        ("a: 2026-99-99\n", "line 1: '2026-99-99' cannot be read as timestamp"),
        ("a: 1\nb: x\u00e9\n".encode("latin-1"), "line 2: the byte 0xe9 is not UTF-8"),
        ("a: 1\n".encode("utf-16"), "line 1: the byte 0xff is not UTF-8"),
        (b"a: 1\nb: x\x00y\n", "line 2: the character '.x00'"),
        (bytes(range(256)), "is not UTF-8"),
    ],
)  # fmt: skip
def test_a_fault_is_named_with_its_line(written, content, wanted):
    with pytest.raises(YamlFileError, match=wanted) as caught:
        read_node(written(content))
    assert ";" in str(caught.value)  # the way out
    with pytest.raises(ValueError, match=wanted):
        read_yaml(written(content))


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\nb: [x, 2.5, null, true, 2026-01-31]\n",
        "base: &base {a: 1, b: 2}\nmine:\n  <<: *base\n  a: 3\n",
        "one: &one {a: 1}\ntwo: [*one, *one]\n",
        "1: a\n'1': b\n",
        "---\na: 1\n...\n",
        "\ufeffa: 1\n",
        "",
        "# only a comment\n",
        "text",
    ],
)
def test_other_files_are_read_as_yaml_reads_them(written, text):
    assert read_yaml(written(text)) == yaml.safe_load(text)
