"""Words -> Conditioning: weights in the prompt, tokenizers and where they are found, encoders."""
