"""GGUF, the file of llama.cpp: block formats, which tensor gets which, codes for them, metadata, the file itself."""
