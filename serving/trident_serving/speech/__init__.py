"""Speech to text with Whisper: an audio file in, text and segments out, on the engine of the encoder-decoders.

audio       the bytes of a file -> samples at the model's rate, one channel
features    samples -> log-mel features
settings    languages, tasks and the tokens that ask for them
rules       what may come next where timestamps are written
search      what is read off the start token: the language, and whether anybody speaks
transcript  tokens of a window -> segments, and where the next window begins
request     tensors -> checked requests
service     all of it for one model's artefacts: windows, one after the other
"""
