import pytest

from dfkd_jax.cost import operations
from dfkd_jax.cost.measure import Program
from tests.helpers.tiny import tiny_config


@pytest.mark.slow
def test_the_time_of_a_step_by_kind_of_operation():
    text = """
%fused_computation.1 (param_0: f32[8,3]) -> f32[8,8] {
  %param_0 = f32[8,3]{1,0} parameter(0)
  ROOT %dot.2 = f32[8,8]{1,0} dot(%param_0, %param_0), lhs_contracting_dims={1}
}

ENTRY %main.3 (a.1: f32[8,3]) -> f32[8,8] {
  %a.1 = f32[8,3]{1,0} parameter(0)
  %ynn_fusion.7 = f32[8,8]{1,0} fusion(%a.1), kind=kCustom, calls=%fused_computation.1, metadata={}
  ROOT %copy.4 = f32[8,8]{0,1} copy(%ynn_fusion.7)
}
"""
    opcodes = operations.opcodes_of(text)
    assert [opcodes[name] for name in ("a.1", "ynn_fusion.7", "copy.4")] == [
        "parameter",
        "dot",
        "copy",
    ]
    assert operations.kind("ynn_fusion.7", "dot") == "matrix products"
    assert operations.kind("copy_bitcast_fusion.2", "fusion") == "copies"
    assert operations.kind("multiply_select_fusion", "fusion") == "elementwise and sums"
    assert operations.kind("while.3", "while") is None
    program = Program("exact", tiny_config())
    seconds = operations.seconds_by_kind(program)
    assert {"convolutions", "elementwise and sums"} <= set(seconds)
    assert list(seconds.values()) == sorted(seconds.values(), reverse=True)
    assert 0 < sum(seconds.values())
