"""Tests of `mergevq.cli.tables`."""

from mergevq.cli.tables import print_table, reconstruction_table


def test_a_table_has_a_title_and_two_columns(capsys):
    print_table("versions", {"torch": "2.13", "a_very_long_name": "1"})
    assert capsys.readouterr().out == "versions\n  torch          2.13\n  a_very_long_name 1\n"


def result(**bits):
    numbers = {"metrics": {"psnr": 20.0}, "infinite": []}
    return {
        "num_kept": 8,
        "given": numbers,
        "recovered": numbers,
        "source_accuracy": 0.5,
        "codebook": {"usage": 0.1, "perplexity": 9.0, "bit_probs": [0.5]},
        "bits": {"tokens": 1, "source": 2, "total": 3, "per_pixel": 1, "per_pixel_recovered": 1}
        | bits,
        "images_per_second": 1.0,
    }


def test_the_price_of_the_map_as_written_is_beside_its_bound():
    data = {"num_images": 1, "image_size": 8, "num_unreadable": 0}
    results = [result(source_coded=512.25), result(source_coded=None)]
    text = reconstruction_table({"results": results, "data": data, "baselines": []})
    lines = [line.split() for line in text.splitlines()]
    assert ["bits,", "source", "as", "coded", "512.2"] in lines
    # Evaluations of earlier versions have no such number.
    text = reconstruction_table({"results": [result()], "data": data, "baselines": []})
    assert "as coded" not in text
