"""Files that `deploykit package` puts beside an engine, word for word: they run on the device, where there is no deploykit.

engine_RUNTIME.py becomes engine.py; run.py and check.py use it. The Kotlin and Swift files are the same for phones. None of
them imports deploykit, and what they need to know of the model they read from model/model.json.
"""
