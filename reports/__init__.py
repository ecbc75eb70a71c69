"""Pictures and pages of runs. Every picture is a function that takes numbers and gives a matplotlib Figure; `style.save` writes it."""
