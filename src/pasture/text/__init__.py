"""Text in and out: chat templates, prompts as tokens, UTF-8 safe detokenising, stop strings. Knows `core` only."""
