"""The search itself: corpus, tokenizer, training, the ask/tell loop, run folders, reports and the command line."""
