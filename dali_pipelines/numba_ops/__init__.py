"""What the CPU graph does in Numba, for DALI's CPU operators do it several times slower or not at all. No DALI here.

A file an idea; each names its twin, the plain way to say the same: a function ``..._twin`` of
:mod:`dali_pipelines.graph`, an operator of DALI, or Pillow. :mod:`~dali_pipelines.numba_ops.layout` says where a view's
numbers lie, :mod:`~dali_pipelines.numba_ops.callbacks` is what DALI calls.
"""
