"""GGUF, llama.cpp's file format: what a merged model's file looks like, and its bytes.

``model`` and ``layout`` say which tensors there are and what they are made of, ``metadata`` the key-values, ``writer``
the bytes before the data; none of them needs torch. ``generated`` makes the tensors that no checkpoint stores, in
torch. How tensors' data is stored is for `shardmerge.codecs.ggml`.
"""
