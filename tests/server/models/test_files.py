"""What has changed of a model, by what stat(2) says."""

from pathlib import Path

from server.models.files import ModelFiles


def test_a_chat_template_of_the_users_is_watched_too(tmp_path: Path) -> None:
    folder, template = tmp_path / "model", tmp_path / "mine.jinja"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    template.write_text("a")
    files = ModelFiles.at(folder, chat_template=template)
    assert files.changes() == []
    template.write_text("ab")
    assert files.changes() == [f"{template} was written or replaced"]
    template.unlink()
    assert files.changes() == [f"{template} is gone"]
    assert ModelFiles.at(folder).changes() == []
