"""One contract between the training loop and the engines that spread it over processes."""
