"""Ray: the processes of a run, where they sit, what is asked of them, and what happens when one dies."""

from or1_megatron.cluster.cluster import Cluster

__all__ = ["Cluster"]
