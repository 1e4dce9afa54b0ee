"""Every method is written out once more, dense and in float64, by a test that is named here."""

import importlib
import inspect

import pytest

from loramerge.registry import methods

# The test that compares a method with a naive transcription of its paper.
WRITTEN_OUT = {
    "arithmetic": "test_golden.test_arithmetic_is_the_weighted_sum",
    "cluster": "test_golden.test_cluster_is_lora_lego_as_defined",
    "consensus": "test_entries.test_consensus_is_its_algorithm_written_out",
    "ctm": "test_subspaces.test_ctm_merges_in_the_subspace_that_holds_the_updates_best",
    "decorrelate": "test_decorrelate.test_thin_factors_give_what_the_formulas_give_in_full",
    "ema": "test_vectors.test_ema_is_the_running_average",
    "fair": "test_factor_merges.test_fair_is_the_least_squares_solution_for_the_mean_of_a",
    "iso": "test_subspaces.test_iso_c_makes_the_numerical_rank_of_the_sum_flat",
    "karcher": "test_vectors.test_karcher_is_where_small_steps_on_the_sphere_end",
    "pad": "test_surgery.test_padding_changes_no_update",
    "project": "test_surgery.test_what_is_left_of_a_projection_is_at_right_angles_to_the_others",
    "prune": "test_prune.test_soft_pruning_is_the_proximal_step_of_the_nuclear_norm",
    "robust": "test_factor_merges.test_robust_is_its_formula_on_svd_factors",
    "scale": "test_surgery.test_scale_multiplies_every_module",
    "sce": "test_entries.test_sce_is_its_algorithm_written_out",
    "select": "test_surgery.test_selected_ranks_are_those_of_the_singular_value_decomposition",
    "slerp": "test_vectors.test_slerp_is_its_formula",
    "squeeze": "test_golden.test_squeeze_is_the_truncated_svd_of_the_dense_update",
    "star": "test_subspaces.test_star_cuts_by_nuclear_norm_and_restores_it",
    "stock": "test_vectors.test_stock_is_its_formula",
    "ties": "test_ties.test_ties_is_its_algorithm_written_out",
    "tsv": "test_tsv.test_tsv_is_tsv_m_in_full_space",
    "wudi": "test_subspaces.test_wudi_solves_its_normal_equations",
}


@pytest.mark.parametrize("name", sorted({*methods(), *WRITTEN_OUT}))
def test_every_method_is_written_out_by_a_test(name: str) -> None:
    assert name in methods()
    module, _, test = WRITTEN_OUT[name].partition(".")
    assert inspect.isfunction(getattr(importlib.import_module(f"tests.{module}"), test))
