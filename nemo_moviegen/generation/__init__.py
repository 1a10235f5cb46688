"""Making videos of prompts: `generate`, what it checks first, the files it writes, prompts rewritten."""
