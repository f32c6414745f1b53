"""An HTTP door for Trident servers: what OpenAI's, Cohere's, Jina's, TEI's and Ollama's clients speak.

It holds no model and no tokenizer. Everything comes from a server, over `trident_client.AsyncClient`.
"""
