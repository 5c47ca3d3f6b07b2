"""What stands around `durable`: the command line and its demo, the page, and an engine on several machines.

They use the public names of `durable` and what `durable.tools` lists, and nothing else of it; it knows nothing of them.
"""
