import json

import pytest
import torch

from minrl.errors import ConfigError
from minrl.scripts.examples import selective_copy
from minrl.scripts.examples.selective_copy import Copier, Settings, Task, main, make_table


def sample(batch_size=200, seed=0, **options):
    task = Task(**options)
    return task, *task.sample(batch_size, torch.Generator().manual_seed(seed))


def test_answers_are_the_data_tokens_in_order():
    _, sequences, answers = sample(length=20, tokens=5, vocabulary=7)
    assert sequences.shape == (200, 25)
    for sequence, answer in zip(sequences.tolist(), answers.tolist(), strict=True):
        seen, asked = sequence[:20], sequence[20:]
        assert [symbol for symbol in seen if symbol != 0] == answer
        assert asked == [6] * 5
        assert all(1 <= symbol <= 5 for symbol in answer)


def test_data_tokens_lie_anywhere_and_are_any_symbol():
    _, sequences, answers = sample(20_000, length=10, tokens=3, vocabulary=6)
    taken = (sequences[:, :10] != 0).float().mean(0)
    torch.testing.assert_close(taken, torch.full((10,), 0.3), rtol=0, atol=0.02)
    symbols = torch.stack([(answers == symbol).float().mean(0) for symbol in range(1, 5)])
    torch.testing.assert_close(symbols, torch.full((4, 3), 0.25), rtol=0, atol=0.02)


def test_length_of_the_paper_holds_its_sixteen_tokens():
    _, sequences, answers = sample(4, length=4096)
    assert ((sequences[:, :4096] > 0).sum(1) == 16).all()
    assert answers.shape == (4, 16)


def test_the_same_seed_draws_the_same_sequences():
    drawn = [sample(length=10, tokens=3, seed=seed)[1] for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("options", [{"tokens": 11}, {"tokens": 0}, {"tokens": 2, "vocabulary": 3}])
def test_impossible_tasks_are_refused(options):
    with pytest.raises(ConfigError):
        Task(length=10, **options)


@pytest.mark.parametrize("cell", ["mingru", "minlstm"])
def test_logits_at_a_marker_do_not_depend_on_later_symbols(cell):
    torch.manual_seed(0)
    task, sequences, _ = sample(3, length=12, tokens=4)
    model = Copier(task, cell, depth=2, width=8, expansion=2, dropout=0.0)
    logits = model(sequences)
    assert logits.shape == (3, 4, 16)
    sequences[:, -2:] = 1
    torch.testing.assert_close(model(sequences)[:, :2], logits[:, :2])


def test_a_copier_that_cheats_measures_100_and_one_that_guesses_little():
    task = Task(length=12, tokens=4)

    class Cheat(torch.nn.Module):
        def forward(self, sequences):
            data = sequences[:, :12]
            order = (data == 0).sort(dim=1, stable=True).indices[:, :4]
            return torch.nn.functional.one_hot(data.gather(1, order), 16).float()

    class Guess(torch.nn.Module):
        def forward(self, sequences):
            return torch.nn.functional.one_hot(torch.ones_like(sequences[:, :4]), 16).float()

    measure = selective_copy.measure_accuracy
    assert measure(Cheat(), task, torch.device("cpu")) == 100
    assert abs(measure(Guess(), task, torch.device("cpu")) - 100 / 14) < 2


def test_table_gives_mean_and_spread_over_seeds_beside_the_paper():
    rows = [
        {"cell": "mingru", "depth": 3, "seed": seed, "accuracy": accuracy}
        for seed, accuracy in enumerate([90.0, 92.0])
    ]
    table = make_table(rows, 64, 8)
    assert "| mingru | 3 | 91.0 ± 1.4 (2) | 99.5 |" in table
    assert "8 of 64" in table
    assert "16 of 4096" in table


def test_two_blocks_learn_a_short_task_and_files_tell_of_it(tmp_path, capsys):
    settings = Settings(
        cells=("mingru",),
        depths=(2,),
        length=6,
        tokens=2,
        steps=250,
        learning_rate=1e-2,
        width=32,
        evaluations=3,
        device="cpu",
        output=tmp_path / "new" / "copy.json",
    )
    (row,) = main(settings)
    assert row["accuracy"] > 85
    assert len(row["curve"]) in (3, 4)
    assert row["curve"][0][1] < row["accuracy"]
    written = json.loads(settings.output.read_text())
    assert written["rows"][0]["accuracy"] == row["accuracy"]
    assert written["settings"]["steps"] == 250
    assert settings.output.with_suffix(".png").stat().st_size > 1000
    assert "| mingru | 2 |" in capsys.readouterr().out
