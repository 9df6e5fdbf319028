"""Surgery over lists of tensors in Triton: one launch a pass, over a table of addresses.

Program = a chunk of one tensor's place in every list, dense in one order; its segment says which sum it belongs to
and which weights it takes. Addresses and element types come from tables, so that lists of any mix of dtypes need no
launch of their own. Partial sums are float64 and added in the order of the chunks; weights never leave the device.
"""

from unlearn_kernels.triton_kernels.surgery.conflict import project_conflict_
from unlearn_kernels.triton_kernels.surgery.sums import combine_, gramian

__all__ = ["combine_", "gramian", "project_conflict_"]
