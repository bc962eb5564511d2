"""The one folder that knows vLLM: the in-process engine, its worker, and the seams between them."""
