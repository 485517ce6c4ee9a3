"""GGUF, llama.cpp's file format: what a merged model's file looks like, and its bytes.

``model`` and ``layout`` describe the tensors, ``metadata`` the key-values, ``writer`` the header; none of them needs
torch. ``generated`` computes the tensors that no checkpoint stores. `shardmerge.codecs.ggml` encodes tensor data.
"""
