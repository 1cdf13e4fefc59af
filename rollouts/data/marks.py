"""The marks of the streaming protocol, as text.

They are no ids: `rollouts.streaming.tokens` gives a model the tokens."""

SKIP = "<skip>"
TOKENS = ("<SEP>", "<EOQ>", "<EOS>", "<EOT>", "<EOR>", "<EOA>", SKIP)
