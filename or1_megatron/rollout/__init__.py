"""Generation: vLLM in process. The only room that imports vllm."""
