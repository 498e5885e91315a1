"""The counts of the cost model."""

from benchmarks.scaling import collectives


def test_collectives_are_counted_with_their_bytes():
    hlo = """
      %a = f32[64,3]{1,0} all-reduce(%x), replica_groups={}
      %b = (f32[2]{0}, bf16[10]{0}) all-reduce(%y, %z), to_apply=%sum
      %c = f32[] all-reduce-start(%w)
      %d = f32[8,2]{1,0} all-gather(%v), dimensions={0}
      %e = f32[4]{0} add(%v, %all-reduce.7)
    """
    assert collectives(hlo) == {"all-reduce": (3, 768 + 28 + 4), "all-gather": (1, 64)}
