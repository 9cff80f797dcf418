"""Directions of Muon: against the singular values that they are made of."""

import torch

from rlhf_lightning.functional.muon import by_kind, directions, nearest_orthogonal


def test_singular_values_go_through_the_polynomial_and_singular_vectors_stay() -> None:
    given = torch.randn(3, 8, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    given[1] *= 1e-6
    left, values, right = torch.linalg.svd(given, full_matrices=False)
    values = values / given.norm(dim=(1, 2)).unsqueeze(1)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    expected = left @ torch.diag_embed(values) @ right
    torch.testing.assert_close(nearest_orthogonal(given.float()).double(), expected, rtol=0, atol=2e-6)
    assert not nearest_orthogonal(torch.zeros(1, 2, 3)).any()


def test_each_matrix_has_its_own_direction_whichever_way_it_lies() -> None:
    noise = torch.Generator().manual_seed(0)
    given = [torch.nn.Parameter(torch.randn(shape, generator=noise)) for shape in ((4, 9), (9, 4), (4, 4), (4, 9))]
    found = {id(weight): direction for weight, direction in directions(given, lambda weight: weight.detach())}
    for weight in given:
        wide = weight.detach() if len(weight) <= weight.shape[1] else weight.detach().T
        expected = nearest_orthogonal(wide.unsqueeze(0))[0]
        torch.testing.assert_close(found[id(weight)], expected if wide.shape == weight.shape else expected.T)


def test_tables_vectors_and_stacks_are_no_matrices() -> None:
    shapes = ((4, 9), (7, 4), (4,), (2, 3, 4))
    matrix, table, vector, stack = (torch.nn.Parameter(torch.zeros(shape)) for shape in shapes)
    matrices, others = by_kind([vector, matrix, stack, table], [table])
    assert [id(x) for x in matrices] == [id(matrix)]
    assert [id(x) for x in others] == [id(x) for x in (vector, stack, table)]
