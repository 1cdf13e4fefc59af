"""The marks of the streaming protocol, as text.

`rollouts.streaming.tokens` says what they mean, and gives a vocabulary their tokens."""

SKIP = "<skip>"
TOKENS = ("<SEP>", "<EOQ>", "<EOS>", "<EOT>", "<EOR>", "<EOA>", SKIP)
