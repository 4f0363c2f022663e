"""Tests of `mergevq.cli.tables`."""

from mergevq.cli.tables import print_table


def test_a_table_has_a_title_and_two_columns(capsys):
    print_table("versions", {"torch": "2.13", "a_very_long_name": "1"})
    assert capsys.readouterr().out == "versions\n  torch          2.13\n  a_very_long_name 1\n"
