"""What stands in a page as code, and whether an output is the one that is shown."""

import pytest

from tests.support.code_blocks import BadPageError, blocks, commands, indented, missing, page_says

PAGE = """\
<!-- code: relay with keys -->
Text.

<!-- code: browser; expect a; b -->
```js title="a.js"
1
```

- item

  ```sh
  x \\
    y
  ```

<!-- code: hidden python; expect done
print("done")
-->
"""


def test_blocks_of_all_kinds() -> None:
    """Fenced, in a list, hidden; with what their comments say. A semicolon of a text is not one of ours."""
    with pytest.raises(BadPageError, match="line 5"):
        blocks(PAGE)
    script, shell, hidden = blocks(PAGE.replace("; b", ""))
    assert (script.line, script.language, script.title, script.code) == (5, "js", "a.js", "1\n")
    assert script.said == {"browser": "", "expect": "a"}
    assert (shell.language, shell.code) == ("sh", "x \\\n  y\n")
    assert (hidden.language, hidden.code, hidden.said) == ("python", 'print("done")\n', {"expect": "done"})
    assert hidden.is_hidden
    assert page_says(PAGE) == {"relay with keys"}


@pytest.mark.parametrize("comment", ["skip", "skip:", "backgruond", "fails badly", "expect"])
def test_a_comment_that_nobody_knows(comment: str) -> None:
    with pytest.raises(BadPageError):
        blocks(f"<!-- code: {comment} -->\n```sh\ntrue\n```\n")


def test_blocks_by_indentation_are_found() -> None:
    assert indented("a\n\n    b\n    c\n\nd\n") == [3]
    assert not indented("- a\n\n    b\n\n  ```sh\n\n    c\n  ```\n\n```sh\n\n    d\n```\n")


@pytest.mark.parametrize(
    ("shown", "output"),
    [
        ("completed in 0.9 s, 17 tokens", "x\ncompleted in 12 s, 1,024 tokens\n"),
        ("job 8a277ebf46514388891a38910926f06f", "job 00000000000000000000000000000000"),
        ('{"id": "8a27…", "ok": …}', '{"id": "ffff",  "ok": [1]}'),
        ("a\nc", "a\nb\nc"),
        ("", ""),
    ],
)
def test_what_is_near_enough(shown: str, output: str) -> None:
    assert missing(shown, output) is None


@pytest.mark.parametrize(
    ("shown", "output"),
    [("b\na", "a\nb"), ("17 tokens", "tokens"), ("completed", "failed"), ("job 8a27", "job x"), ("a", "")],
)
def test_what_is_not(shown: str, output: str) -> None:
    assert missing(shown, output) == shown.splitlines()[-1]


def test_a_script() -> None:
    """As a whole; by lines where one may print the id that the next one means."""
    assert commands("if a\nfi\n", console=False) == [("if a\nfi\n", "")]
    assert commands("a \\\n  b\n\nc JOB_ID\n", console=False) == [("a \\\n  b\n", ""), ("c JOB_ID\n", "")]


def test_a_console() -> None:
    """Commands, over several lines too, each with its output."""
    text = "$ a \\\n> b\nout\n\n$ c\n"
    assert commands(text, console=True) == [("a \\\nb\n", "out\n\n"), ("c\n", "")]
    with pytest.raises(BadPageError):
        commands("out\n$ a\n", console=True)
