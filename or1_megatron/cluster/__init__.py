"""Ray: the processes of a run, where they sit, what is asked of them, and what happens when one dies."""

from or1_megatron.cluster.cluster import Cluster, check_host

__all__ = ["Cluster", "check_host"]
