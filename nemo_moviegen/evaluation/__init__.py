"""Measuring what was trained (Movie Gen s3.6.1, Tables 10 to 12): numbers, pictures and a page."""
